package abuse

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
	"kraken/proto/cluster"
)

// TestLeasesNotFetched: somebody leases the pieces of a blob that a node pulls, as fast as 66 connections go and under
// an invented peer id each time, and fetches none. The pull takes little longer than while he does so with another blob
// of the same size, which is as much work for the machine, whether he is at another address than the node or at the
// same.
func TestLeasesNotFetched(t *testing.T) {
	const size = 32 << 20
	c := start(t, options{agents: 1})
	timed := func(attacker string, same bool) time.Duration {
		m := c.metainfo(t, "leases/app", random(size))
		hoarded := m
		if !same {
			hoarded = c.metainfo(t, "leases/app", random(size))
		}
		defer c.hoard(t, attacker, hoarded)()
		began := time.Now()
		resp, err := c.client(t).Get(c.Agents[0].URL + "/v2/leases/app/blobs/" + m.Digest.String())
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		v := m.Digest.Verifier()
		if n, err := io.Copy(v, resp.Body); err != nil || n != size || !v.Verified() {
			t.Fatalf("%d bytes, verified: %v, error: %v", n, v.Verified(), err)
		}
		return time.Since(began)
	}
	host := 1
	stranger := func() string { // of whom nothing is known yet
		host++
		return fmt.Sprintf("127.0.0.%d", host)
	}
	for who, from := range map[string]func() string{"a stranger": stranger, "the node's address": func() string { return "127.0.0.1" }} {
		apart, beside := timed(stranger(), false), timed(from(), true)
		t.Logf("%d MiB: %s beside leases of another blob, %s beside leases by %s", size>>20, apart.Round(time.Millisecond), beside.Round(time.Millisecond), who)
		if beside > 3*apart+5*time.Second { // without the budgets of leases it is 20 s
			t.Errorf("%d MiB took %s while %s leased and did not fetch, and %s beside leases of another blob", size>>20, beside, who, apart)
		}
	}
}

// hoard leases a blob's pieces at all origins from an address and fetches none, until the result is called. It returns
// when each of its 66 connections has had an answer.
func (c *system) hoard(t *testing.T, from string, m *blob.Metainfo) (end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	tr := &http.Transport{MaxIdleConnsPerHost: 66, DialContext: (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).DialContext}
	hc := &http.Client{Transport: tr}
	begun, ended := make(chan error, 66), make(chan int, 66)
	for i := range cap(begun) {
		go func() {
			n := 0
			for ; ctx.Err() == nil; n++ {
				err := leaseAs(ctx, hc, c.Origins[(i+n)%len(c.Origins)].URL, m, fmt.Sprintf("%040x", rand.Uint64()))
				if n == 0 {
					begun <- err
				}
			}
			ended <- n
		}()
	}
	for range cap(begun) {
		if err := <-begun; err != nil {
			t.Error(err)
		}
	}
	return func() {
		cancel()
		asked := 0
		for range cap(ended) {
			asked += <-ended
		}
		tr.CloseIdleConnections()
		t.Logf("%d leases were asked for from %s", asked, from)
	}
}

// leaseAs asks for as many pieces as there may be in a lease, as a peer that has none.
func leaseAs(ctx context.Context, hc *http.Client, origin string, m *blob.Metainfo, peer string) error {
	body, err := json.Marshal(cluster.LeaseRequest{Peer: peer, Have: blob.NewBitmap(m.NumPieces()).Bytes(), Max: cluster.MaxLeasePieces})
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, origin+"/v2/mine/_kraken/lease/"+m.Digest.String(), strings.NewReader(string(body)))
	if err != nil {
		return err
	}
	resp, err := hc.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode >= 500 {
		err = fmt.Errorf("a lease: status %d: %s", resp.StatusCode, answer)
	}
	return err
}

// TestManySmallRanges: a request of 4 kB for 1,000 ranges of a blob is answered with what the blob has, and the origins
// send the proxy no more than that and a little.
func TestManySmallRanges(t *testing.T) {
	c := start(t, options{})
	hc := c.client(t)
	content := random(16 << 20)
	d := pushBlob(t, hc, c.Proxy.URL, "ranges/app", content)
	c.settled(t)
	sent := func() (n float64) {
		for _, o := range c.Origins {
			n += o.metric(t, "kraken_http_sent_bytes_total")
		}
		return n
	}
	for name, ranges := range map[string]func(i int) string{
		"apart":        func(i int) string { return fmt.Sprintf("%d-%d", i*16000, i*16000+1) },
		"the same":     func(int) string { return "0-1" },
		"backwards":    func(i int) string { return fmt.Sprintf("%d-%d", (999-i)*16000, (999-i)*16000) },
		"open, nested": func(i int) string { return fmt.Sprintf("%d-", i) },
		"suffixes":     func(i int) string { return fmt.Sprintf("-%d", 1+i) },
	} {
		var all []string
		for i := range 1000 {
			all = append(all, ranges(i))
		}
		before := sent()
		a := do(t, hc, "GET", c.Proxy.URL, "/v2/ranges/app/blobs/"+d.String(), nil, "Range", "bytes="+strings.Join(all, ","))
		if a.status == http.StatusOK && digest.FromBytes(a.body) != d {
			t.Errorf("%s: 200 with %d bytes, another blob", name, len(a.body))
		}
		if a.status != http.StatusOK && a.status != http.StatusPartialContent && a.status != http.StatusRequestedRangeNotSatisfiable {
			t.Errorf("%s: status %d: %.200s", name, a.status, a.body)
		}
		if more := sent() - before; more > float64(len(content)+1<<20) {
			t.Errorf("%s: origins sent %.1f MiB for a blob of %d MiB", name, more/(1<<20), len(content)>>20)
		}
	}
}
