package swarm

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"kraken/proto/transport"
)

// A node that others do not accept, or that does not accept others, gets all its bytes from the origins, and nothing
// but the load there would show it. So each handshake that fails is counted by its reason and said on both sides, and
// readiness says when nobody could be reached.

const (
	// unreachedAfter is how many dials in a row must fail until that is worth a word: peers come and go.
	unreachedAfter = 3
	// unreachedFor is how long it is said after the last of them, and refusedFor where certificates were the reason: a
	// node that nobody pulls at dials nobody.
	unreachedFor = 2 * time.Minute
	refusedFor   = 10 * time.Minute
	// verdictTime is how long an accepted connection that failed is kept for the other side to read why.
	verdictTime = 500 * time.Millisecond
)

// reach is what became of the dials since the last peer that was reached, or has reached us.
type reach struct {
	mu      sync.Mutex
	failed  int
	peer    netip.AddrPort // the last one
	err     error
	at      time.Time
	refused bool // by one side's certificate
	lines   map[string]*rate.Sometimes
}

// reached notes a peer whose handshakes are done.
func (r *reach) reached() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed, r.refused, r.err = 0, false, nil
}

// missed notes a peer that was dialled and not reached.
func (r *reach) missed(peer netip.AddrPort, err error, refused bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed++
	r.peer, r.err, r.at = peer, err, time.Now()
	r.refused = r.refused || refused
}

// say runs f for the first lines of a reason and then one in half a minute: whoever fails must not fill the log.
func (r *reach) say(reason string, f func()) {
	r.mu.Lock()
	if r.lines == nil {
		r.lines = map[string]*rate.Sometimes{}
	}
	s := r.lines[reason]
	if s == nil {
		s = &rate.Sometimes{First: 3, Interval: 30 * time.Second}
		r.lines[reason] = s
	}
	r.mu.Unlock()
	s.Do(f)
}

// CheckPeers returns an error when the peers that this node was offered lately could not be reached: since the last
// that was, certificates were refused or several dials failed.
func (s *Swarm) CheckPeers(context.Context) error {
	r := &s.reach
	r.mu.Lock()
	defer r.mu.Unlock()
	since := time.Since(r.at)
	if r.err == nil || !(r.refused && since < refusedFor) && !(r.failed >= unreachedAfter && since < unreachedFor) {
		return nil
	}
	return fmt.Errorf("none of the peers that were offered could be reached, %d dials failed, the last one %s ago at %s: %w",
		r.failed, since.Round(time.Second), r.peer, r.err)
}

// handshakeFailed counts and says why TLS with a peer did not come about. It returns the reason, empty where the
// connection just ended.
func (s *Swarm) handshakeFailed(peer netip.AddrPort, err error) string {
	reason, byThem := transport.HandshakeFailure(err)
	if reason == "" {
		return ""
	}
	by := "us"
	if byThem {
		by = "them"
	}
	s.m.handshakes.WithLabelValues(reason, by).Inc()
	s.reach.say(reason+by, func() {
		s.log.Warn("TLS with a peer failed: it is not traded with", "peer", peer, "reason", reason, "refused_by", by, "error", err)
	})
	return reason
}

// handshake does TLS on an accepted connection, at its first Read. Who is refused gets to read why.
func (c *conn) handshake() error {
	t, ok := c.Conn.(*tls.Conn)
	if !ok || c.outgoing || c.shaken {
		return nil
	}
	c.shaken = true
	err := t.Handshake()
	if err == nil {
		return nil
	}
	if c.s.handshakeFailed(c.address.addr, err) != "" && c.tcp != nil {
		// Closed with bytes unread the connection would be reset, and the alert be lost on its way.
		if cerr := c.tcp.CloseWrite(); cerr == nil {
			_ = c.tcp.SetReadDeadline(time.Now().Add(verdictTime)) // it may be closed by now
			_, _ = io.Copy(io.Discard, io.LimitReader(c.tcp, 64<<10))
		}
	}
	return err
}

// readFailed notes what the first Read of a dialled connection says: with TLS 1.3 it is there that the other side
// refuses our certificate.
func (c *conn) readFailed(err error) {
	if _, ok := c.Conn.(*tls.Conn); ok && c.outgoing && c.received == 0 && c.s.handshakeFailed(c.address.addr, err) != "" {
		c.s.reach.missed(c.address.addr, err, true)
		c.missed.Store(true)
	}
}

// hungUp notes a dialled peer that closed the connection before it said who it is.
func (c *conn) hungUp() {
	select {
	case <-c.s.closing:
		return
	default:
	}
	if c.outgoing && !c.met.Load() && !c.missed.Load() {
		c.s.reach.missed(c.address.addr, errHungUp, false)
	}
}

var errHungUp = errors.New("the connection was closed before the handshake; a node with TLS closes it on one without")

// dialFailed notes a peer that could not be dialled, and returns err with what was attempted.
func (s *Swarm) dialFailed(ctx context.Context, peer netip.AddrPort, what string, err error) error {
	if ctx.Err() == nil || errors.Is(err, context.DeadlineExceeded) { // the library ends dials that it needs no more
		s.reach.missed(peer, err, s.handshakeFailed(peer, err) != "")
	}
	return fmt.Errorf("%s %s: %w", what, peer, err)
}
