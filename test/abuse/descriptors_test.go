package abuse

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// TestDescriptors: whoever opens connections until an agent has no file descriptors left is refused before that, and
// bodies that are under way come whole.
func TestDescriptors(t *testing.T) {
	c := start(t, options{agents: 1})
	hc, agent := c.client(t), c.Agents[0]
	var want []digest.Digest
	for range 6 {
		want = append(want, pushBlob(t, hc, c.Proxy.URL, "many/app", random(3<<20)))
	}
	limit := unix.Rlimit{Cur: 160, Max: 160}
	if err := unix.Prlimit(agent.PID(), unix.RLIMIT_NOFILE, &limit, nil); err != nil {
		t.Fatal(err)
	}
	bodies := make([]*http.Response, len(want))
	begin := func(i int) {
		resp, err := hc.Get(agent.URL + "/v2/many/app/blobs/" + want[i].String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		if resp.StatusCode != http.StatusOK {
			t.Fatalf("body %d: %s", i, resp.Status)
		}
		bodies[i] = resp
	}
	for i := range 3 { // read later
		begin(i)
	}
	// What the agent opens while it fetches these comes and goes, and would hide the refusals.
	eventually(t, time.Minute, func() error {
		if n := agent.metric(t, "kraken_agent_pull_seconds_count"); n != 3 {
			return fmt.Errorf("the agent has ended %v fetches", n)
		}
		return nil
	})
	served, refused, cut := 0, 0, 0
	var conns []net.Conn
	for range 400 {
		nc, err := net.Dial("tcp", agent.Addr)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, nc)
		nc.SetDeadline(time.Now().Add(20 * time.Second))
		fmt.Fprintf(nc, "GET /v2/ HTTP/1.1\r\nHost: %s\r\n\r\n", agent.Addr)
		resp, err := http.ReadResponse(bufio.NewReader(nc), nil)
		switch {
		case err != nil && strings.Contains(err.Error(), "timeout"):
			t.Fatalf("no answer after %d, with %d descriptors open: %v", len(conns), agent.descriptors(t), err)
		case err != nil:
			cut++
		case resp.StatusCode == http.StatusServiceUnavailable && resp.Header.Get("Retry-After") != "" && resp.Close:
			refused++
		case resp.StatusCode == http.StatusOK:
			served++
		default:
			t.Fatalf("connection %d: %s %v", len(conns), resp.Status, resp.Header)
		}
	}
	if served == 0 || refused == 0 {
		t.Errorf("%d served, %d refused, %d cut", served, refused, cut)
	}
	if n := agent.descriptors(t); n >= int(limit.Cur) {
		t.Errorf("all %d descriptors are used", n)
	}
	for i := range 3 {
		b, err := io.ReadAll(bodies[i].Body)
		if err != nil || digest.FromBytes(b) != want[i] {
			t.Errorf("body %d ended after %d bytes: %v", i, len(b), err)
		}
	}
	for _, nc := range conns {
		nc.Close()
	}
	eventually(t, 10*time.Second, func() error {
		resp, err := hc.Get(agent.URL + "/v2/")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("still %s", resp.Status)
		}
		return nil
	})
	for i := 3; i < len(want); i++ {
		begin(i)
		if b, err := io.ReadAll(bodies[i].Body); err != nil || digest.FromBytes(b) != want[i] {
			t.Errorf("body %d ended after %d bytes: %v", i, len(b), err)
		}
	}
}
