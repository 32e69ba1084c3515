package swarm

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/anacrolix/torrent"
	pp "github.com/anacrolix/torrent/peer_protocol"
	"github.com/opencontainers/go-digest"

	"kraken/origin/swarm/plan"
	"kraken/proto/blob"
)

// address is a peer's address as the library holds it. It leads from the library's connection back to ours, so that a
// peer can be disconnected without the library's lock.
type address struct {
	text string
	addr netip.AddrPort
	conn atomic.Pointer[conn]
}

func (a *address) Network() string { return "tcp" }
func (a *address) String() string  { return a.text }

// dialText returns the library's key of an address that is dialled for one torrent. It is no ip:port, so the library
// keeps no lists of bad addresses of its own: on one host all peers share an IP address.
func dialText(ap netip.AddrPort, ih blob.InfoHash) string { return ap.String() + "/" + ih.String() }

// conn is a connection with a peer, accepted or dialled.
type conn struct {
	net.Conn
	s        *Swarm
	address  *address
	outgoing bool
	deadline *time.Timer // of the handshakes, where it was accepted; under the Swarm's mu
	closed   sync.Once
	gone     chan struct{} // closed by Close

	// Of the reader.
	shaken   bool   // TLS was done, well or not; of an accepted one
	received int    // bytes; exact until the first message
	pending  []byte // to be read before more is received
	plain    bool   // the handshake was not obfuscated

	tcp    *net.TCPConn // under TLS, too
	window int          // for receiving, as the kernel was told; 0: nothing. Of shareLink

	met    atomic.Bool // the handshakes are done
	missed atomic.Bool // it was noted as one that could not be reached

	raw    syscall.RawConn // where blocks are sent by sendfile; nil with TLS
	framed bool            // from the first message on: Write sees messages, not what was made of them by encryption
	said   time.Time       // when Write sent something

	// Set when the handshake is complete, before others see the connection.
	id       [20]byte
	t        *loaded
	stranger bool      // none of ours: served, never asked
	peer     plan.Peer // what the board of what is fetched knows of it

	// Under the library's lock.
	saidField bool        // a bitfield, HaveAll or HaveNone was received
	saidHave  bool        // a Have was received
	all       bool        // has everything
	have      blob.Bitmap // what it has otherwise; only while we fetch
}

// wrap makes a conn of a connection, and lets a lead back to it.
func (s *Swarm) wrap(nc net.Conn, a *address, outgoing bool) *conn {
	c := &conn{Conn: nc, s: s, address: a, outgoing: outgoing, gone: make(chan struct{})}
	if tc, ok := nc.(*net.TCPConn); ok {
		c.tcp = tc
		if raw, err := tc.SyscallConn(); err == nil {
			c.raw = raw
		}
	} else if t, ok := nc.(interface{ NetConn() net.Conn }); ok { // TLS
		c.tcp, _ = t.NetConn().(*net.TCPConn)
	}
	a.conn.Store(c)
	return c
}

// admit counts a connection: one that was dialled among the peers, if there is room for one more; one that was accepted
// among those whose handshakes are not done, where the oldest makes room.
func (s *Swarm) admit(c *conn) bool {
	s.mu.Lock()
	select {
	case <-s.closing:
		s.mu.Unlock()
		return false
	default:
	}
	if c.outgoing && len(s.conns)-len(s.unfinished.all) >= s.cfg.MaxConns {
		s.mu.Unlock()
		return false
	}
	s.conns[c] = struct{}{}
	s.wg.Add(1)
	var oldest *conn
	if !c.outgoing {
		oldest = s.unfinished.add(c)
		c.deadline = time.AfterFunc(handshakeTime, func() { c.silent() })
	}
	s.mu.Unlock()
	if oldest != nil {
		s.m.refused.Inc()
		oldest.Close()
	}
	return true
}

// silent closes a connection whose handshakes took too long.
func (c *conn) silent() {
	c.s.mu.Lock()
	waiting := c.s.unfinished.remove(c)
	c.s.mu.Unlock()
	if waiting {
		c.s.m.refused.Inc()
		c.Close()
	}
}

// Close may be called by anyone, often.
func (c *conn) Close() error {
	err := c.Conn.Close()
	c.closed.Do(func() {
		close(c.gone)
		c.hungUp()
		c.s.mu.Lock()
		_, counted := c.s.conns[c]
		delete(c.s.conns, c)
		if c.deadline != nil {
			c.deadline.Stop()
		}
		c.s.unfinished.remove(c)
		c.s.mu.Unlock()
		if counted {
			c.s.wg.Done()
		}
	})
	return err
}

// Ban implements plan.Conn.
func (c *conn) Ban(reason string) { c.s.ban(c, reason) }

// SetDeadline never fails: the library panics if it does (v1.61.0, initiateProtocolHandshakes and runReceivedConn), and
// a connection may have been closed by then, by a ban or the end of the Swarm. The next Read or Write says so.
func (c *conn) SetDeadline(t time.Time) error {
	if err := c.Conn.SetDeadline(t); err != nil {
		c.s.log.Debug("no deadline for a peer", "peer", c.address.addr, "error", err)
	}
	return nil
}

// Read keeps to the download rate, and waits while the peer has to be judged first.
func (c *conn) Read(b []byte) (int, error) {
	if err := c.handshake(); err != nil {
		return 0, err
	}
	if len(c.pending) > 0 {
		n := copy(b, c.pending)
		c.pending = c.pending[n:]
		return n, nil
	}
	switch {
	case c.received < handshakeLen: // not a byte further: completedHandshake comes first
		b = b[:min(len(b), handshakeLen-c.received)]
	case c.received == handshakeLen && c.t != nil && !c.stranger:
		if err := c.readFirst(); err != nil {
			return 0, err
		}
		return c.Read(b)
	}
	c.wait()
	var key digest.Digest
	if c.t != nil {
		key = c.t.m.Digest
	}
	b = b[:min(len(b), c.s.limiter.TurnDown())]
	n, err := c.Conn.Read(b)
	if err != nil {
		c.readFailed(err)
	}
	if k := len(pp.Protocol) - c.received; k > 0 && n > 0 {
		c.plain = (c.plain || c.received == 0) && strings.HasPrefix(pp.Protocol[c.received:], string(b[:min(n, k)]))
	}
	c.received += n
	if n > 0 {
		c.s.limiter.WaitDown(c.gone, key, n)
	}
	return n, err
}

// handshakeLen is the length of a BEP 3 handshake.
const handshakeLen = 68

var haveAll = pp.Message{Type: pp.HaveAll}.MustMarshalBinary()

// readFirst reads the first message. A HaveAll is handed on as a bitfield without the last piece, and a Have of that.
// The library does not count HaveAll for pieces that it has not looked at since, so these seem rarer than the ones it
// has begun: it would begin all pieces and complete none until the end.
func (c *conn) readFirst() error {
	first := make([]byte, len(haveAll))
	if _, err := io.ReadFull(c.Conn, first); err != nil {
		return err
	}
	c.received += len(first)
	c.pending = first
	if !bytes.Equal(first, haveAll) {
		return nil
	}
	n := c.t.m.NumPieces()
	field := make([]bool, (n+7)/8*8)
	for i := range n - 1 {
		field[i] = true
	}
	c.pending = append(pp.Message{Type: pp.Bitfield, Bitfield: field}.MustMarshalBinary(),
		pp.Message{Type: pp.Have, Index: pp.Integer(n - 1)}.MustMarshalBinary()...)
	return nil
}

// wait blocks while nothing more should be read, for a bounded time: the verdict may hang on another peer.
func (c *conn) wait() {
	if c.t == nil || c.t.data.board() == nil {
		return
	}
	hold := c.t.data.board().Hold(&c.peer)
	if hold == nil {
		return
	}
	t := time.NewTimer(c.s.cfg.StallTimeout)
	defer t.Stop()
	for hold != nil {
		select {
		case <-hold:
			hold = c.t.data.board().Hold(&c.peer)
		case <-c.gone:
			return
		case <-t.C:
			c.t.data.board().Excuse(&c.peer)
			return
		}
	}
}

// RemoteAddr leads the library back to this connection.
func (c *conn) RemoteAddr() net.Addr { return c.address }

// connOf finds our connection behind one of the library's.
func connOf(p *torrent.Peer) *conn {
	a, ok := p.RemoteAddr.(*address)
	if !ok {
		return nil
	}
	return a.conn.Load()
}

// listener accepts connections for the library.
type listener struct {
	net.Listener
	s *Swarm
}

// Accept returns an error only once the swarm is closed: the library would ask again at once.
func (l *listener) Accept() (net.Conn, error) {
	for {
		nc, err := l.Listener.Accept()
		if err != nil {
			select {
			case <-l.s.closing:
				return nil, err
			default:
			}
			if errors.Is(err, net.ErrClosed) {
				<-l.s.closing
				return nil, err
			}
			l.s.log.Warn("accepting peers fails", "error", err)
			select {
			case <-l.s.closing:
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		if l.s.descriptors.Scarce() { // bodies that are under way need them
			nc.Close()
			l.s.m.refused.Inc()
			continue
		}
		if t := l.s.cfg.TLS; t.Server != nil {
			nc = tls.Server(nc, t.Server)
		}
		text := nc.RemoteAddr().String()
		ap, err := netip.ParseAddrPort(text)
		if err != nil {
			nc.Close()
			continue
		}
		c := l.s.wrap(nc, &address{text: text, addr: netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())}, false)
		if !l.s.admit(c) {
			nc.Close()
			l.s.m.refused.Inc()
			continue
		}
		return c, nil
	}
}

// dialer dials for the library.
type dialer struct{ s *Swarm }

func (dialer) DialerNetwork() string { return "tcp" }

// Dial connects to an address of dialText's form, which a Fetch has added.
func (d dialer) Dial(ctx context.Context, text string) (net.Conn, error) {
	a := d.s.dialing(text)
	if a == nil {
		return nil, fmt.Errorf("dial %s: not a peer that was added", text)
	}
	if d.s.bans.has([20]byte{}, a.addr) {
		return nil, fmt.Errorf("dial %s: peer is banned", a.addr)
	}
	if d.s.descriptors.Scarce() {
		return nil, fmt.Errorf("dial peer %s: too many files and connections are open", a.addr)
	}
	nd := net.Dialer{}
	nc, err := nd.DialContext(ctx, "tcp", a.addr.String())
	if err != nil {
		return nil, d.s.dialFailed(ctx, a.addr, "dial peer", err)
	}
	if t := d.s.cfg.TLS; t.Client != nil {
		tc := tls.Client(nc, t.Client)
		if err := tc.HandshakeContext(ctx); err != nil {
			return nil, errors.Join(d.s.dialFailed(ctx, a.addr, "TLS with peer", err), nc.Close())
		}
		nc = tc
	}
	c := d.s.wrap(nc, a, true)
	if !d.s.admit(c) {
		return nil, errors.Join(fmt.Errorf("dial peer %s: too many connections", a.addr), nc.Close())
	}
	return c, nil
}

// dialing finds the address that a Fetch has given to the library.
func (s *Swarm) dialing(text string) *address {
	_, hash, ok := strings.Cut(text, "/")
	if !ok {
		return nil
	}
	ih, err := parseInfoHash(hash)
	if err != nil {
		return nil
	}
	t := s.find(ih)
	if t == nil {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.dials[text]
}
