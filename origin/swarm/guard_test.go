package swarm

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	pp "github.com/anacrolix/torrent/peer_protocol"

	"kraken/origin/swarm/plan"
)

// Each of these messages is refused, and the node lives on. Some make the library panic when they reach it.
func TestMessagesThatAreNotAllowedEndTheConnection(t *testing.T) {
	b := randomBytes(40, 1<<20)
	n := newNode(t, func(c *Config) { c.StockPeers = true })
	m := n.seed(b)
	pieces := m.NumPieces()
	field := make([]bool, (pieces+7)/8*8)
	field[0] = true
	cases := map[string][]pp.Message{
		"hashes of version 2":              {{Type: pp.Hashes, Length: 1, Hashes: [][32]byte{{1}}}},
		"hash request of version 2":        {{Type: pp.HashRequest, Length: 1}},
		"extended message":                 {{Type: pp.Extended, ExtendedID: 0, ExtendedPayload: []byte("de")}},
		"have none after have all":         {{Type: pp.HaveAll}, {Type: pp.HaveNone}},
		"bitfield after have all":          {{Type: pp.HaveAll}, {Type: pp.Bitfield, Bitfield: field}},
		"bitfield after have":              {{Type: pp.Have, Index: 0}, {Type: pp.Bitfield, Bitfield: field}},
		"long bitfield":                    {{Type: pp.Bitfield, Bitfield: make([]bool, len(field)+8)}},
		"have of a piece that is not":      {{Type: pp.Have, Index: pp.Integer(pieces)}},
		"have of the last integer":         {{Type: pp.Have, Index: 1<<32 - 1}},
		"request of a piece that is not":   {{Type: pp.Request, Index: pp.Integer(pieces), Length: 1}},
		"request beyond a piece":           {{Type: pp.Request, Begin: pp.Integer(m.PieceLength()) - 1, Length: 2}},
		"request of nothing":               {{Type: pp.Request}},
		"request of too much":              {{Type: pp.Request, Length: plan.MaxBlock + 1}},
		"request that overflows":           {{Type: pp.Request, Begin: 1<<32 - 1, Length: 1<<32 - 1}},
		"block that nobody asked for":      {{Type: pp.Piece, Piece: b[:m.PieceLength()]}},
		"block beyond its piece":           {{Type: pp.Piece, Begin: pp.Integer(m.PieceLength()) - 1, Piece: b[:100]}},
		"reject of a piece that is not":    {{Type: pp.Reject, Index: 1<<32 - 1, Length: 1}},
		"reject of nothing that was asked": {{Type: pp.Reject, Length: 1 << 14}},
		"message of no type":               {{Type: 99}},
	}
	for name, msgs := range cases {
		t.Run(name, func(t *testing.T) {
			for _, prefix := range []string{peerIDPrefix, "-XX0001-"} {
				switch msgs[0].Type {
				case pp.Have, pp.HaveAll, pp.Bitfield:
					if prefix != peerIDPrefix {
						continue // what a stranger has is not looked at
					}
				}
				s, err := speakTo(t, n.Addr(), newID(prefix), m.InfoHash())
				if err != nil {
					t.Fatal(err)
				}
				if s.say(msgs...) == nil && !s.hangsUp() {
					t.Errorf("the connection is still open")
				}
			}
			// The torrent can be dropped (the library checks its counts then) and loaded again.
			n.Forget(m.Digest)
			n.Register(m)
		})
	}
	leech := newNode(t, nil)
	leech.fetch(m, nil, n.peer()).finish()
	leech.has(b)
}

// The same while the node fetches: it has asked the peer for something, and has pieces to lose count of.
func TestMessagesThatAreNotAllowedWhileFetching(t *testing.T) {
	b := randomBytes(41, 1<<20)
	m := metainfoOf(t, b)
	block := func(r pp.Message, begin int, n int) pp.Message {
		return pp.Message{Type: pp.Piece, Index: r.Index, Begin: r.Begin + pp.Integer(begin), Piece: make([]byte, n)}
	}
	answers := map[string]func(r pp.Message) []pp.Message{
		"long block":         func(r pp.Message) []pp.Message { return []pp.Message{block(r, 0, int(r.Length)+1)} },
		"short block":        func(r pp.Message) []pp.Message { return []pp.Message{block(r, 0, int(r.Length)-1)} },
		"block over the end": func(r pp.Message) []pp.Message { return []pp.Message{block(r, 1, int(r.Length))} },
		"short shifted block": func(r pp.Message) []pp.Message {
			return []pp.Message{block(r, 1, int(r.Length)-1)}
		},
		"have none late": func(pp.Message) []pp.Message {
			return []pp.Message{{Type: pp.HaveAll}, {Type: pp.HaveNone}, {Type: pp.Have}}
		},
		"have all again": func(pp.Message) []pp.Message { return []pp.Message{{Type: pp.HaveAll}, {Type: pp.HaveAll}} },
		"hashes":         func(pp.Message) []pp.Message { return []pp.Message{{Type: pp.Hashes, Hashes: [][32]byte{{}}}} },
		"reject, then piece": func(r pp.Message) []pp.Message {
			return []pp.Message{{Type: pp.Reject, Index: r.Index, Begin: r.Begin, Length: r.Length}, block(r, 0, int(r.Length))}
		},
		"reject twice": func(r pp.Message) []pp.Message {
			x := pp.Message{Type: pp.Reject, Index: r.Index, Begin: r.Begin, Length: r.Length}
			return []pp.Message{x, x}
		},
		"choke and block": func(r pp.Message) []pp.Message {
			return []pp.Message{{Type: pp.Choke}, block(r, 0, int(r.Length)), {Type: pp.Unchoke}}
		},
	}
	for name, answer := range answers {
		t.Run(name, func(t *testing.T) {
			bad := newSeeder(t, m, newID(peerIDPrefix), answer)
			n := newNode(t, nil)
			d := n.fetch(m, nil, bad.peer)
			eventually(t, "an answer was sent", func() bool { sent, _ := bad.counts(); return sent > 0 })
			eventually(t, "the peer is disconnected", func() bool { return len(n.find(m.InfoHash()).connsOf(bad.peer.ID)) == 0 })
			d.AddSource(newLeaseServer(b))
			d.finish()
			n.has(b)
		})
	}
}

func TestGarbageLeavesTheListenerAlone(t *testing.T) {
	b := randomBytes(42, 1<<20)
	n := newNode(t, nil)
	m := n.seed(b)
	ih := m.InfoHash()
	hello := append([]byte(pp.Protocol), make([]byte, 8)...)
	full := append(append(append([]byte(nil), hello...), ih[:]...), []byte("-KN0001-abcdefghijkl")...)
	random := make([]byte, 100_000)
	rand.Read(random)
	cases := map[string][]byte{
		"nothing":              {},
		"random bytes":         random,
		"half a protocol name": hello[:7],
		"half a handshake":     full[:40],
		"huge length":          append(append([]byte(nil), full...), 0xff, 0xff, 0xff, 0xff, 7),
		"length of a gigabyte": append(append([]byte(nil), full...), 0x40, 0, 0, 0, 7),
		"half a message":       append(append([]byte(nil), full...), 0, 0, 0, 13, 6, 0),
		"empty bitfield":       append(append([]byte(nil), full...), 0, 0, 0, 1, 5),
		"message of no bytes":  append(append([]byte(nil), full...), 0, 0, 0, 5, 4, 0),
		"HTTP":                 []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		"TLS":                  {0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3},
		"unknown info-hash":    append(append(append([]byte(nil), hello...), make([]byte, 20)...), []byte("-KN0001-abcdefghijkl")...),
	}
	for name, junk := range cases {
		t.Run(name, func(t *testing.T) {
			nc, err := net.Dial("tcp", n.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			nc.Write(junk) // it may hang up before it has read all
			nc.(*net.TCPConn).CloseWrite()
			nc.SetReadDeadline(time.Now().Add(20 * time.Second))
			_, err = io.Copy(io.Discard, nc)
			var ne net.Error
			if errors.As(err, &ne) && ne.Timeout() {
				t.Error("the connection is still open")
			}
		})
	}
	leech := newNode(t, nil)
	leech.fetch(m, nil, n.peer()).finish()
	leech.has(b)
}

func TestStrangers(t *testing.T) {
	b := randomBytes(43, 1<<20)
	for _, stock := range []bool{false, true} {
		n := newNode(t, func(c *Config) { c.StockPeers = stock })
		m := n.seed(b)
		s, err := speakTo(t, n.Addr(), newID("-XX0001-"), m.InfoHash())
		if err == nil {
			err = s.say(pp.Message{Type: pp.HaveNone}, pp.Message{Type: pp.Interested})
		}
		var got []byte
		for err == nil && got == nil {
			var msg pp.Message
			if msg, err = s.hear(); err != nil {
				break
			}
			switch msg.Type {
			case pp.Unchoke:
				err = s.say(pp.Message{Type: pp.Request, Index: 1, Begin: 1 << 14, Length: 1 << 14})
			case pp.Piece:
				got = msg.Piece
			}
		}
		if served := got != nil; served != stock {
			t.Errorf("stock peers %v: served %v (%v)", stock, served, err)
		}
		off := m.PieceLength() + 1<<14
		if stock && string(got) != string(b[off:off+1<<14]) {
			t.Error("wrong bytes")
		}
	}
}

// A stranger is served, but never asked: its bytes would come in blocks that it may not send.
func TestStrangersAreNotAsked(t *testing.T) {
	b := randomBytes(44, 1<<20)
	m := metainfoOf(t, b)
	x := newSeeder(t, m, newID("-XX0001-"), blocks(m, func(off, n int64) []byte { return b[off : off+n] }))
	n := newNode(t, func(c *Config) { c.StockPeers = true })
	d := n.fetch(m, nil, x.peer)
	eventually(t, "the stranger is connected", func() bool { _, conns := x.counts(); return conns > 0 })
	d.AddSource(newLeaseServer(b))
	st := d.finish()
	if sent, _ := x.counts(); sent != 0 || st.BytesFromPeers != 0 {
		t.Errorf("the stranger was asked for %d blocks", sent)
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	n := newNode(t, func(c *Config) { c.MaxConns = 2 })
	m := n.seed(randomBytes(60, 1<<20))
	peers := func() int {
		n.mu.Lock()
		defer n.mu.Unlock()
		return len(n.conns) - len(n.unfinished.all)
	}
	var open []*speaker
	for k := range 2 {
		s, err := speakTo(t, n.Addr(), newID(peerIDPrefix), m.InfoHash())
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, s)
		// The node answers a handshake before it counts the peer.
		eventually(t, "the peer is counted", func() bool { return peers() == k+1 })
	}
	if s, err := speakTo(t, n.Addr(), newID(peerIDPrefix), m.InfoHash()); err == nil && !s.hangsUp() {
		t.Error("a third peer is connected")
	}
	open[0].Close()
	eventually(t, "a place is free again", func() bool {
		s, err := speakTo(t, n.Addr(), newID(peerIDPrefix), m.InfoHash())
		return err == nil && s.isServed()
	})
}

// TestSilentConnections: whoever connects and says nothing takes no place of a peer, is closed by the time that
// handshakes have, and those of one source are few.
func TestSilentConnections(t *testing.T) {
	t.Parallel()
	n := newNode(t, func(c *Config) { c.MaxConns = 2 })
	b := randomBytes(61, 1<<20)
	m := n.seed(b)
	var silent []net.Conn
	for range 2 * maxUnfinishedOf {
		nc, err := net.Dial("tcp", n.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		silent = append(silent, nc)
	}
	eventually(t, "all are accepted", func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		return len(n.unfinished.all) == maxUnfinishedOf && len(n.conns) == maxUnfinishedOf
	})
	leech := newNode(t, nil)
	leech.fetch(m, nil, n.peer()).finish()
	leech.has(b)
	for _, nc := range silent {
		nc.SetReadDeadline(time.Now().Add(2 * handshakeTime))
		if _, err := nc.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("a silent connection is still open")
		}
	}
}

// TestUnfinished: the oldest of a source makes room for it, and the oldest of all where there are too many.
func TestUnfinished(t *testing.T) {
	of := func(text string) *conn {
		return &conn{address: &address{addr: netip.AddrPortFrom(netip.MustParseAddr(text), 1)}}
	}
	var u unfinished
	first, elder := of("192.0.2.1"), of("2001:db8::1")
	u.add(first)
	u.add(elder)
	for i := range maxUnfinishedOf - 1 {
		if out := u.add(of(fmt.Sprintf("2001:db8::%x", i+2))); out != nil {
			t.Fatalf("%s had to go for the %dth of its network", out.address.addr, i+2)
		}
	}
	if out := u.add(of("2001:db8::ffff")); out != elder {
		t.Error("the oldest of the network stays")
	}
	for i := len(u.all); i < maxUnfinished; i++ {
		if out := u.add(of(fmt.Sprintf("198.51.%d.%d", i/256, i%256))); out != nil {
			t.Fatal("a source of its own had to wait for another")
		}
	}
	if out := u.add(of("203.0.113.1")); out != first || len(u.all) != maxUnfinished {
		t.Error("the oldest of all stays")
	}
	if !u.remove(u.all[3]) || u.remove(first) {
		t.Error("what is removed is not what was there")
	}
}
