package abuse

import (
	"bytes"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// relay is a listener that passes connections on to a target, and what comes back after a delay.
type relay struct {
	net.Listener
	target atomic.Pointer[string] // nil: connections are closed
	delay  atomic.Int64           // time.Duration
	conns  sync.WaitGroup
}

func newRelay(t *testing.T) *relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{Listener: l}
	r.conns.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r.conns.Go(func() { r.pass(c) })
		}
	})
	t.Cleanup(func() { l.Close() })
	return r
}

func (r *relay) pass(c net.Conn) {
	defer c.Close()
	target := r.target.Load()
	if target == nil {
		return
	}
	to, err := net.Dial("tcp", *target)
	if err != nil {
		return
	}
	defer to.Close()
	r.conns.Go(func() {
		io.Copy(to, c) // either side's end ends both
		to.Close()
	})
	buf := make([]byte, 32<<10)
	for {
		n, err := to.Read(buf)
		time.Sleep(time.Duration(r.delay.Load())) // this is the slow network of the test
		if _, werr := c.Write(buf[:n]); err != nil || werr != nil {
			return
		}
	}
}

// TestSlowBuildIndex: while build-index answers after a second, a tag that was moved is served with what it is now, by
// whichever agent.
func TestSlowBuildIndex(t *testing.T) {
	r := newRelay(t)
	c := start(t, options{agents: 1, config: map[string]map[string]any{"agent": {"build_index": map[string]any{"url": "http://" + r.Addr().String()}}}})
	r.target.Store(&c.BuildIndex.Addr)
	hc := c.client(t)
	old := push(t, hc, c.Proxy.URL, "slow/app", "latest", random(1000))
	if got, _ := pull(t, hc, c.Agents[0].URL, "slow/app", "latest"); !bytes.Equal(got, old) {
		t.Fatalf("another manifest: %s", got)
	}
	moved := push(t, hc, c.Proxy.URL, "slow/app", "latest", random(1000))
	r.delay.Store(int64(time.Second))
	began := time.Now()
	got, _ := pull(t, hc, c.Agents[0].URL, "slow/app", "latest")
	if !bytes.Equal(got, moved) {
		t.Errorf("after %s: the tag is %s, which it was before", time.Since(began), got)
	}
	if took := time.Since(began); took < time.Second || took > 10*time.Second {
		t.Errorf("it took %s: the answer did not come by way of the slow network, or much later", took)
	}
	// One that can't be reached is another matter: then an old answer is better than none.
	gone := "127.0.0.1:1"
	r.target.Store(&gone)
	r.delay.Store(0)
	r.Listener.Close()
	if got, _ := pull(t, hc, c.Agents[0].URL, "slow/app", "latest"); !bytes.Equal(got, moved) {
		t.Errorf("build-index is away, and the tag is %s", got)
	}
}
