package swarm

import (
	"net"
	"syscall"
	"testing"
	"time"

	"kraken/proto/config"
)

func TestReceiveWindow(t *testing.T) {
	const mbit = 1_000_000 / 8
	for name, tc := range map[string]struct {
		link  config.Rate
		peers int
		rtt   time.Duration
		want  int
	}{
		"rate is not known":                  {0, 10, 0, 0},
		"shared":                             {25 * mbit, 5, 0, 31_250},
		"nobody counted yet":                 {10 * mbit, 0, 0, 62_500},
		"a crowd":                            {10 * mbit, 50, 0, minReceive},
		"more than the kernel is asked for":  {25 * mbit, 1, 0, 0},
		"fast link":                          {10_000 * mbit, 100, 0, 0},
		"long path":                          {25 * mbit, 10, 5 * time.Millisecond, 31_250},
		"long path, so that all is too much": {25 * mbit, 2, 50 * time.Millisecond, 0},
	} {
		if got := receiveWindow(tc.link, tc.peers, tc.rtt); got != tc.want {
			t.Errorf("%s: %d, want %d", name, got, tc.want)
		}
	}
}

// TestPeersShareReceiveWindow: the more peers are connected, the less each may have on its way; it is given back when they leave.
func TestPeersShareReceiveWindow(t *testing.T) {
	const link = 4_000_000 // 200 KB in queueTime
	s := newNode(t, func(c *Config) { c.LinkRate = link }).Swarm
	var peers []net.Conn
	connect := func(n int) {
		t.Helper()
		for range n {
			c, err := net.Dial("tcp", s.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			peers = append(peers, c)
		}
	}
	windows := func() (out []int) {
		s.mu.Lock()
		defer s.mu.Unlock()
		for c := range s.conns {
			out = append(out, readBuffer(t, c.tcp))
		}
		return out
	}
	all := func(n int, ok func(w int) bool) func() bool {
		return func() bool {
			ws := windows()
			for _, w := range ws {
				if !ok(w) {
					return false
				}
			}
			return len(ws) == n
		}
	}
	// The kernel doubles what it is told (socket(7)), and it is told in steps.
	about := func(want int) func(int) bool {
		return func(w int) bool { return w/2 > want*2/3 && w/2 < want*3/2 }
	}
	untold := readBuffer(t, func() *net.TCPConn {
		connect(1)
		return peers[0].(*net.TCPConn)
	}())
	eventually(t, "one peer is left to the kernel", all(1, func(w int) bool { return w == untold }))
	connect(3)
	eventually(t, "four share", all(4, about(link/20/4)))
	connect(16)
	eventually(t, "twenty share", all(20, about(link/20/20)))
	for _, c := range peers[4:] {
		c.Close()
	}
	eventually(t, "four again", all(4, about(link/20/4)))
	for _, c := range peers[1:4] {
		c.Close()
	}
	eventually(t, "one again", all(1, about(maxReceive)))
}

// TestReceiveWindowWithoutLinkRate: without a rate nothing is told to the kernel.
func TestReceiveWindowWithoutLinkRate(t *testing.T) {
	s := newNode(t, nil).Swarm
	c, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var got *conn
	eventually(t, "connected", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		for got = range s.conns {
		}
		return got != nil
	})
	if w, own := readBuffer(t, got.tcp), readBuffer(t, c.(*net.TCPConn)); w != own {
		t.Errorf("receive buffer of %d, and %d on a connection that nothing was done to", w, own)
	}
}

func readBuffer(t *testing.T, c *net.TCPConn) (n int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	cerr := raw.Control(func(fd uintptr) { n, err = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF) })
	if cerr != nil || err != nil {
		return 0 // closed meanwhile
	}
	return n
}
