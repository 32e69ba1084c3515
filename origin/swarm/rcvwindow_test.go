package swarm

import (
	"context"
	"errors"
	"net"
	"syscall"
	"testing"
	"time"

	pp "github.com/anacrolix/torrent/peer_protocol"

	"kraken/proto/config"
	"kraken/proto/transport"
)

func TestReceiveWindow(t *testing.T) {
	const mbit = 1_000_000 / 8
	for name, tc := range map[string]struct {
		link    config.Rate
		peers   int
		rtt     time.Duration
		segment int
		want    int
	}{
		"shared":                             {25 * mbit, 5, 0, 1448, 31_250},
		"nobody counted yet":                 {10 * mbit, 0, 0, 1448, 62_500},
		"a crowd":                            {10 * mbit, 50, 0, 1448, 6 * 1448},
		"a crowd with jumbo frames":          {10 * mbit, 50, 0, 8948, 6 * 8948},
		"more than the kernel is asked for":  {25 * mbit, 1, 0, 1448, 0},
		"fast link":                          {10_000 * mbit, 100, 0, 1448, 0},
		"long path":                          {25 * mbit, 10, 5 * time.Millisecond, 1448, 31_250},
		"long path, so that all is too much": {25 * mbit, 2, 50 * time.Millisecond, 1448, 0},
		"loopback":                           {10 * mbit, 50, 0, 32_741, 0},
	} {
		if got := receiveWindow(tc.link, tc.peers, transport.Path{RoundTrip: tc.rtt, Segment: tc.segment}); got != tc.want {
			t.Errorf("%s: %d, want %d", name, got, tc.want)
		}
	}
}

// TestPeersShareLink: the more peers a blob is fetched from, the less each may have on its way; it is given back when
// they leave.
func TestPeersShareLink(t *testing.T) {
	const link = 4_000_000 // 200 KB in queueTime
	m := metainfoOf(t, randomBytes(70, 8<<20))
	n := newNode(t, func(c *Config) { c.LinkRate = link })
	over := make(chan struct{})
	var peers []Peer
	var listeners []net.Listener
	for i := range 20 {
		l := listenEthernet(t)
		id := [20]byte([]byte("-KN0001-window-peer-"))
		id[19] = byte('a' + i)
		peers = append(peers, newSeederAt(t, l, m, id, func(pp.Message) []pp.Message {
			<-over // connected, and never done
			return nil
		}).peer)
		listeners = append(listeners, l)
	}
	d := n.fetch(m, nil, peers[0])
	t.Cleanup(func() {
		close(over)
		d.Close()
		d.part.Close()
	})
	await := func(what string, count int, ok func(window, share int) bool) {
		t.Helper()
		eventually(t, what, func() bool {
			cs := n.feeding()
			for _, c := range cs {
				p, _ := transport.PathOf(c.tcp)
				// The kernel doubles what it is told (socket(7)).
				if !ok(readBuffer(t, c.tcp)/2, receiveWindow(link, len(cs), p)) {
					return false
				}
			}
			return len(cs) == count
		})
	}
	// In steps, so about.
	shared := func(window, share int) bool { return share > 0 && window > share*2/3 && window < share*3/2 }
	awaitShares(t, n, peers[0].Addr.String(), func(c *conn, untouched int) {
		if got := readBuffer(t, c.tcp); got != untouched {
			t.Errorf("one peer has a receive buffer of %d, and %d if it is left to the kernel", got, untouched)
		}
	})
	d.AddPeers(peers[1:4])
	await("four share", 4, shared)
	d.AddPeers(peers[4:])
	await("twenty share", 20, shared)
	for _, l := range listeners[1:] {
		l.Close()
	}
	for _, c := range n.feeding() {
		if c.address.addr != peers[0].Addr {
			c.Close()
		}
	}
	await("one has it all", 1, func(window, _ int) bool { return window > maxReceive*3/4 && window <= maxReceive*5/4 })
}

// TestLinkRateWithLargeSegments: a window of less than some segments would stop a sender, so over loopback, where they
// are long, there is none.
func TestLinkRateWithLargeSegments(t *testing.T) {
	b := randomBytes(71, 8<<20)
	for name, change := range map[string]func(*Config){"TCP": func(*Config) {}, "TLS": func() func(*Config) {
		ours := mutualTLS(t)
		return func(c *Config) { c.TLS = ours }
	}()} {
		t.Run(name, func(t *testing.T) {
			seeds := []*node{newNode(t, change), newNode(t, change), newNode(t, change)}
			m := seeds[0].seed(b)
			seeds[1].seed(b)
			seeds[2].seed(b)
			n := newNode(t, func(c *Config) {
				change(c)
				c.LinkRate, c.DownloadRate = 1_000_000, 4_000_000 // slow enough to look at
			})
			d := n.fetch(m, nil, seeds[0].peer(), seeds[1].peer(), seeds[2].peer())
			awaitShares(t, n, seeds[0].Addr().String(), func(c *conn, untouched int) {
				if w := readBuffer(t, c.tcp); w < untouched && w > 0 {
					t.Errorf("a receive buffer of %d, want at least %d", w, untouched)
				}
			})
			d.finish()
			n.has(b)
		})
	}
}

// TestNoLinkRateNoWindow: without a rate nothing is told to the kernel.
func TestNoLinkRateNoWindow(t *testing.T) {
	m := metainfoOf(t, randomBytes(72, 8<<20))
	n := newNode(t, nil)
	over := make(chan struct{})
	x := newSeederAt(t, listenEthernet(t), m, [20]byte([]byte("-KN0001-window-peer-")), func(pp.Message) []pp.Message {
		<-over
		return nil
	})
	d := n.fetch(m, nil, x.peer)
	t.Cleanup(func() {
		close(over)
		d.Close()
		d.part.Close()
	})
	awaitShares(t, n, x.peer.Addr.String(), func(c *conn, untouched int) {
		if got := readBuffer(t, c.tcp); got != untouched {
			t.Errorf("receive buffer of %d, and %d on a connection that nothing was done to", got, untouched)
		}
	})
}

// awaitShares waits until windows would have been set, and checks a connection beside one to the same address that
// nothing was done to.
func awaitShares(t *testing.T, n *node, addr string, check func(c *conn, untouched int)) {
	t.Helper()
	other, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	eventually(t, "connected", func() bool { return len(n.feeding()) > 0 })
	since := time.Now()
	eventually(t, "shares are given", func() bool { return time.Since(since) > 3*newPeerDelay })
	cs := n.feeding()
	if len(cs) == 0 {
		t.Error("nobody is connected any more")
	}
	for _, c := range cs {
		check(c, readBuffer(t, other.(*net.TCPConn)))
	}
}

// listenEthernet makes peers send segments as on Ethernet.
func listenEthernet(t testing.TB) net.Listener {
	t.Helper()
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_MAXSEG, 1460) })
		return errors.Join(cerr, err)
	}}
	l, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
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
