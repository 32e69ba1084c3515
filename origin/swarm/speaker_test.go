package swarm

import (
	"bufio"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	pp "github.com/anacrolix/torrent/peer_protocol"

	"kraken/proto/blob"
)

// speaker speaks the peer protocol by hand, so that it can say what no client says.
type speaker struct {
	net.Conn
	t    testing.TB
	id   [20]byte // of the other side
	wmu  sync.Mutex
	rbuf *bufio.Reader
}

func newID(prefix string) (id [20]byte) {
	rand.Read(id[:])
	copy(id[:], prefix)
	return id
}

// handshake exchanges BEP 3 handshakes; the dialling side says its info-hash first.
func handshake(t testing.TB, nc net.Conn, id [20]byte, ih blob.InfoHash, dialled bool) (*speaker, error) {
	nc.SetDeadline(time.Now().Add(20 * time.Second))
	var reserved [8]byte
	reserved[7] = 4 // BEP 6
	var hello []byte
	hello = append(hello, pp.Protocol...)
	hello = append(hello, reserved[:]...)
	hello = append(hello, ih[:]...)
	hello = append(hello, id[:]...)
	s := &speaker{Conn: nc, t: t, rbuf: bufio.NewReader(nc)}
	if dialled {
		if _, err := nc.Write(hello); err != nil {
			return nil, err
		}
	}
	var theirs [68]byte
	if _, err := io.ReadFull(s.rbuf, theirs[:]); err != nil {
		return nil, err
	}
	copy(s.id[:], theirs[48:])
	if !dialled {
		if [20]byte(theirs[28:48]) != ih {
			return nil, errors.New("other info-hash")
		}
		if _, err := nc.Write(hello); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// speakTo dials a node.
func speakTo(t testing.TB, addr netip.AddrPort, id [20]byte, ih blob.InfoHash) (*speaker, error) {
	nc, err := net.Dial("tcp", addr.String())
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { nc.Close() })
	return handshake(t, nc, id, ih, true)
}

func (s *speaker) say(msgs ...pp.Message) error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	for _, m := range msgs {
		b, err := m.MarshalBinary()
		if err != nil {
			return err
		}
		if _, err := s.Write(b); err != nil {
			return err
		}
	}
	return nil
}

func (s *speaker) hear() (pp.Message, error) {
	d := pp.Decoder{R: s.rbuf, MaxLength: 4 << 20}
	var m pp.Message
	err := d.Decode(&m)
	return m, err
}

// hangsUp reads until the other side closes the connection, and fails the test if it does not.
func (s *speaker) hangsUp() bool {
	for {
		if _, err := s.hear(); err != nil {
			var ne net.Error
			return !errors.As(err, &ne) || !ne.Timeout()
		}
	}
}

// isServed reports whether the other side unchokes us. It is false when it closes the connection.
func (s *speaker) isServed() bool {
	if s.say(pp.Message{Type: pp.HaveNone}, pp.Message{Type: pp.Interested}) != nil {
		return false
	}
	for {
		m, err := s.hear()
		if err != nil || m.Type == pp.Unchoke {
			return err == nil
		}
	}
}

// seeder is a seed that answers every request with what answer says. It counts its answers.
type seeder struct {
	peer  Peer
	mu    sync.Mutex
	sent  int
	conns int
}

func (x *seeder) counts() (sent, conns int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.sent, x.conns
}

// newSeeder listens and has everything. answer returns the answer to a request.
func newSeeder(t testing.TB, m *blob.Metainfo, id [20]byte, answer func(r pp.Message) []pp.Message) *seeder {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return newSeederAt(t, l, m, id, answer)
}

// newSeederAt takes over the listener.
func newSeederAt(t testing.TB, l net.Listener, m *blob.Metainfo, id [20]byte, answer func(r pp.Message) []pp.Message) *seeder {
	t.Helper()
	x := &seeder{peer: Peer{ID: id, Addr: netip.MustParseAddrPort(l.Addr().String())}}
	var wg sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[nc] = true
			mu.Unlock()
			wg.Go(func() {
				defer nc.Close()
				x.serve(t, nc, m, answer)
			})
		}
	})
	return x
}

func (x *seeder) serve(t testing.TB, nc net.Conn, m *blob.Metainfo, answer func(r pp.Message) []pp.Message) {
	s, err := handshake(t, nc, x.peer.ID, m.InfoHash(), false)
	if err != nil {
		return
	}
	x.mu.Lock()
	x.conns++
	x.mu.Unlock()
	if s.say(pp.Message{Type: pp.HaveAll}, pp.Message{Type: pp.Unchoke}) != nil {
		return
	}
	for {
		r, err := s.hear()
		if err != nil {
			return
		}
		if r.Type != pp.Request || r.Keepalive {
			continue
		}
		x.mu.Lock()
		x.sent++
		x.mu.Unlock()
		if s.say(answer(r)...) != nil {
			return
		}
	}
}

// blocks answers with blocks.
func blocks(m *blob.Metainfo, block func(off, n int64) []byte) func(r pp.Message) []pp.Message {
	return func(r pp.Message) []pp.Message {
		b := block(int64(r.Index)*m.PieceLength()+int64(r.Begin), int64(r.Length))
		return []pp.Message{{Type: pp.Piece, Index: r.Index, Begin: r.Begin, Piece: b}}
	}
}

// lies answers with wrong blocks.
func lies(m *blob.Metainfo, b []byte) func(r pp.Message) []pp.Message {
	return blocks(m, func(off, n int64) []byte {
		out := append([]byte(nil), b[off:off+n]...)
		out[n/2] ^= 0xff
		return out
	})
}
