package swarm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anacrolix/torrent"
	pp "github.com/anacrolix/torrent/peer_protocol"

	"kraken/origin/swarm/plan"
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

// A block on its way to a peer that has stopped reading does not hold up the commit, for which the library's lock may
// wait.
func TestCommitWhileAPeerDoesNotRead(t *testing.T) {
	b := randomBytes(92, 3*blob.MinPieceLength)
	c, m, other := sending(t, b, nil)
	if err := errors.Join(c.Conn.(*net.TCPConn).SetWriteBuffer(4<<10), other.(*net.TCPConn).SetReadBuffer(4<<10)); err != nil {
		t.Fatal(err)
	}
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(pp.Message{Type: pp.Piece, Piece: make([]byte, len(b))}.MustMarshalBinary())
		sent <- err
	}()
	// the block is on its way, and too long for the buffers
	if _, err := io.ReadFull(other, make([]byte, blockHead+1)); err != nil {
		t.Fatal(err)
	}
	r, err := c.s.cfg.Store.Open(m.Digest)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { c.t.data.commit(r); close(done) }()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Error("the commit waits for the peer")
	}
	got := make([]byte, len(b)-1)
	if _, err := io.ReadFull(other, got); err != nil || !bytes.Equal(got, b[1:]) {
		t.Errorf("the block does not arrive whole: %v", err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	<-done
}

// TestSendingGoesOnWithTheNextFile: the file of a partial blob is closed when the blob was committed.
func TestSendingGoesOnWithTheNextFile(t *testing.T) {
	b := randomBytes(94, 100_000)
	c, _, other := sending(t, randomBytes(95, blob.MinPieceLength), nil)
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	open := func() *os.File {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	closed, next := open(), open()
	closed.Close()
	files := []*os.File{closed, next}
	err := sendOpen(c.raw, c.Conn, func() *os.File { f := files[0]; files = files[1:]; return f }, 10, int64(len(b)-10))
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(b)-10)
	if _, err := io.ReadFull(other, got); err != nil || !bytes.Equal(got, b[10:]) {
		t.Errorf("something else arrives: %v", err)
	}
	for name, open := range map[string]func() *os.File{"closed for good": func() *os.File { return closed }, "dropped": func() *os.File { return nil }} {
		if err := sendOpen(c.raw, c.Conn, open, 0, 10); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s: sending says %v", name, err)
		}
	}
}

// Where the kernel can't send from a file the block is copied.
func TestBlocksAreCopied(t *testing.T) {
	b := randomBytes(96, 3*plan.MaxBlock)
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var got bytes.Buffer
	if err := copyFile(&got, f, 5, int64(len(b)-5)); err != nil || !bytes.Equal(got.Bytes(), b[5:]) {
		t.Errorf("other bytes are copied: %v", err)
	}
	if err := copyFile(io.Discard, f, 5, int64(len(b))); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("copying beyond the end says %v", err)
	}
	// A directory is no file that anything can be sent from.
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	c, _, _ := sending(t, randomBytes(95, blob.MinPieceLength), nil)
	if _, err := sendFile(c.raw, dir, 0, 10); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("sending a directory says %v", err)
	}
}

// logged is what was logged so far.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *logged) warnings() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), "level=WARN")
}

// The disk's faults are told to the operator, a peer's leaving is not.
func TestUnreadableBlocksAreTold(t *testing.T) {
	block := pp.Message{Type: pp.Piece, Index: 1, Piece: make([]byte, blob.MinPieceLength)}.MustMarshalBinary()
	for name, x := range map[string]struct {
		spoil func(*testing.T, *conn)
		want  int
	}{
		"the file is short": {func(t *testing.T, c *conn) {
			if err := os.Truncate(c.t.data.file.File().Name(), blob.MinPieceLength+10); err != nil {
				t.Fatal(err)
			}
		}, 1},
		"the peer is gone": {func(t *testing.T, c *conn) { c.Close() }, 0},
		"it was dropped":   {func(t *testing.T, c *conn) { c.t.data.close() }, 0},
	} {
		t.Run(name, func(t *testing.T) {
			var log logged
			c, _, other := sending(t, randomBytes(91, 3*blob.MinPieceLength), func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
			x.spoil(t, c)
			go io.Copy(io.Discard, other)
			if _, err := c.Write(block); err == nil {
				t.Error("it was sent")
			}
			if got := log.warnings(); got != x.want {
				t.Errorf("%d warnings: %s", got, log.text.String())
			}
		})
	}
}

// TestTorrentAddedAgainSinceTheHandshake: a connection that was introduced to a torrent which is not there any more
// would be booked there, and its blocks be sent as the old one decided.
func TestTorrentAddedAgainSinceTheHandshake(t *testing.T) {
	c, m, _ := sending(t, randomBytes(97, 3*blob.MinPieceLength), nil)
	pc := &torrent.PeerConn{}
	pc.RemoteAddr = c.address
	c.s.connAdded(pc)
	select {
	case <-c.gone:
	default:
		t.Error("the connection goes on")
	}
	// And one with the torrent that is there.
	c2, _, _ := sending(t, randomBytes(97, 3*blob.MinPieceLength), nil)
	c2.t = c2.s.load(m.InfoHash())
	pc.RemoteAddr = c2.address
	c2.s.connAdded(pc)
	select {
	case <-c2.gone:
		t.Error("the connection was ended")
	default:
	}
	c2.s.connClosed(pc)
}

func TestBlocksAreReadForTLS(t *testing.T) {
	for name, tls := range map[string]TLS{"plain": {}, "TLS": mutualTLS(t)} {
		n := newNode(t, func(c *Config) { c.TLS = tls })
		m := n.seed(randomBytes(98, 3*blob.MinPieceLength))
		if got := n.load(m.InfoHash()).data.copied.Load(); got != (tls.Server != nil) {
			t.Errorf("%s: blocks are read by the library: %v", name, got)
		}
	}
}

// TestAQuietConnectionIsKeptAlive lets a connection be silent for as long as a keep-alive is held back.
func TestAQuietConnectionIsKeptAlive(t *testing.T) {
	c, _, other := sending(t, randomBytes(91, 100), nil)
	alive := pp.Message{Keepalive: true}.MustMarshalBinary()
	have := pp.Message{Type: pp.Have, Index: 3}.MustMarshalBinary()
	write := func(bs ...[]byte) {
		for _, b := range bs {
			if n, err := c.Write(b); err != nil || n != len(b) {
				t.Fatalf("wrote %d of %d bytes: %v", n, len(b), err)
			}
		}
	}
	write(alive, alive, have, alive)
	c.said = c.said.Add(-keepAlive)
	write(alive, alive)
	c.Close()
	got, err := io.ReadAll(other)
	if want := slices.Concat(alive, have, alive); err != nil || !bytes.Equal(got, want) {
		t.Errorf("sent %x, want %x: %v", got, want, err)
	}
}
