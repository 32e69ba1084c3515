package swarm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"

	pp "github.com/anacrolix/torrent/peer_protocol"

	"kraken/proto/blob"
)

// sending is a connection of a node that seeds b, as it is once messages have begun, and its other end.
func sending(t *testing.T, b []byte, change func(*Config)) (*conn, *blob.Metainfo, net.Conn) {
	t.Helper()
	n := newNode(t, change)
	m := n.seed(b)
	r, err := n.store.Open(m.Digest)
	if err != nil {
		t.Fatal(err)
	}
	data := &content{m: m, file: r}
	t.Cleanup(func() { data.close() })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	other, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { other.Close() })
	c := n.wrap(nc, &address{text: "x", addr: netip.MustParseAddrPort(l.Addr().String())}, true)
	t.Cleanup(func() { c.Close() })
	if c.raw == nil {
		t.Fatal("a TCP connection can't send from a file")
	}
	c.t, c.framed = &loaded{m: m, data: data}, true
	return c, m, other
}

// TestMessagesArriveAsWritten writes messages as the library does. Where blocks go from the file, it has not read them.
func TestMessagesArriveAsWritten(t *testing.T) {
	b := randomBytes(90, 5*blob.MinPieceLength+77)
	for _, x := range []struct {
		name   string
		copied bool // as with TLS
		change func(*Config)
	}{
		{"from the file", false, nil},
		{"copied", true, nil},
		{"in parts", false, func(c *Config) { c.UploadRate = 4 << 20 }},
		{"copied in parts", true, func(c *Config) { c.UploadRate = 4 << 20 }},
	} {
		t.Run(x.name, func(t *testing.T) {
			c, m, other := sending(t, b, x.change)
			if x.copied {
				c.raw = nil
			}
			piece := func(i, begin, n int) pp.Message {
				off := i*int(m.PieceLength()) + begin
				return pp.Message{Type: pp.Piece, Index: pp.Integer(i), Begin: pp.Integer(begin), Piece: b[off : off+n]}
			}
			have, unchoke := pp.Message{Type: pp.Have, Index: 3}, pp.Message{Type: pp.Unchoke}
			writes := [][]pp.Message{
				{have, piece(0, 0, blob.MinPieceLength), unchoke, piece(5, 0, 77), have},
				{piece(2, 16<<10, 16<<10)},
				{piece(4, 1, 1), piece(4, 0, 1)},
				{{Keepalive: true}, have},
			}
			var want bytes.Buffer
			sent := make(chan error, 1)
			var writing [][]byte
			for _, w := range writes {
				var buf bytes.Buffer
				for _, msg := range w {
					want.Write(msg.MustMarshalBinary())
					if !x.copied {
						msg.Piece = make([]byte, len(msg.Piece))
					}
					buf.Write(msg.MustMarshalBinary())
				}
				writing = append(writing, buf.Bytes())
			}
			go func() {
				for _, w := range writing {
					if n, err := c.Write(w); err != nil || n != len(w) {
						sent <- fmt.Errorf("wrote %d of %d bytes: %w", n, len(w), err)
						return
					}
				}
				sent <- nil
			}()
			got := make([]byte, want.Len())
			if _, err := io.ReadFull(other, got); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want.Bytes()) {
				t.Error("something else arrives")
			}
			if err := <-sent; err != nil {
				t.Error(err)
			}
		})
	}
}

// What can't be sent right is not sent: the connection ends, since the head of the block is out.
func TestBlocksThatCannotBeSent(t *testing.T) {
	block := pp.Message{Type: pp.Piece, Index: 1, Piece: make([]byte, blob.MinPieceLength)}.MustMarshalBinary()
	for _, x := range []struct {
		name  string
		write []byte
		spoil func(*testing.T, *conn)
		want  error
	}{
		{"half a message", block[:100], nil, errTorn},
		{"half a length", []byte{0, 0}, nil, errTorn},
		{"the file is short", block, func(t *testing.T, c *conn) {
			if err := os.Truncate(c.t.data.file.File().Name(), blob.MinPieceLength+10); err != nil {
				t.Fatal(err)
			}
		}, io.ErrUnexpectedEOF},
		{"the torrent was dropped", block, func(t *testing.T, c *conn) { c.t.data.close() }, os.ErrClosed},
		{"the file is closed", block, func(t *testing.T, c *conn) { c.t.data.file.File().Close() }, os.ErrClosed},
		{"the connection is closed", block, func(t *testing.T, c *conn) { c.Close() }, net.ErrClosed},
	} {
		t.Run(x.name, func(t *testing.T) {
			c, _, other := sending(t, randomBytes(91, 3*blob.MinPieceLength), nil)
			if x.spoil != nil {
				x.spoil(t, c)
			}
			go io.Copy(io.Discard, other)
			if n, err := c.Write(x.write); !errors.Is(err, x.want) || n == len(x.write) {
				t.Errorf("writing answers %d, %v, want %v", n, err, x.want)
			}
		})
	}
}

// TestForgetWhileAPeerDoesNotRead: a block on its way to a peer that has stopped reading holds nothing up.
func TestForgetWhileAPeerDoesNotRead(t *testing.T) {
	seed := newNode(t, nil)
	m := seed.seed(randomBytes(92, 16<<20))
	s, err := speakTo(t, seed.Addr(), newID(peerIDPrefix), m.InfoHash())
	if err != nil {
		t.Fatal(err)
	}
	ask := []pp.Message{{Type: pp.Interested}}
	size := blockSize(m.PieceLength())
	for i := range m.NumPieces() {
		ask = append(ask, pp.Message{Type: pp.Request, Index: pp.Integer(i), Length: pp.Integer(min(size, m.PieceSize(i)))})
	}
	if err := s.say(ask[0]); err != nil {
		t.Fatal(err)
	}
	for {
		msg, err := s.hear()
		if err != nil {
			t.Fatal(err)
		}
		if msg.Type == pp.Unchoke && !msg.Keepalive {
			break
		}
	}
	if err := s.say(ask[1:]...); err != nil {
		t.Fatal(err)
	}
	eventually(t, "blocks are sent", func() bool { return seed.Sent()[m.Digest] > 0 })
	done := make(chan struct{})
	go func() { seed.Forget(m.Digest); close(done) }()
	eventually(t, "the blob is forgotten", func() bool {
		select {
		case <-done:
			return true
		default:
			return false
		}
	})
	if !s.hangsUp() {
		t.Error("the peer stays connected")
	}
}
