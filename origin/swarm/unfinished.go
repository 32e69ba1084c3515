package swarm

import (
	"slices"
	"time"

	"kraken/proto/transport"
)

// Accepted connections whose handshakes, TLS and BitTorrent, are not done have a quota of their own: whoever says
// nothing takes no place of who does. An honest handshake takes some round trips, so where there are too many the
// oldest goes.
const (
	// handshakeTime is what both handshakes may take together.
	handshakeTime = 5 * time.Second
	// maxUnfinished bounds them in all, maxUnfinishedOf the ones of a source.
	maxUnfinished   = 512
	maxUnfinishedOf = 128
)

// unfinished are connections without a handshake, the oldest first. Its user holds the Swarm's mu.
type unfinished struct{ all []*conn }

// add counts c, and returns a connection that must be closed for it, or nil.
func (u *unfinished) add(c *conn) (out *conn) {
	source, n, oldest := transport.SourceNetwork(c.address.addr.Addr()), 0, -1
	for i, x := range u.all {
		if transport.SourceNetwork(x.address.addr.Addr()) == source {
			if n++; oldest < 0 {
				oldest = i
			}
		}
	}
	switch {
	case n >= maxUnfinishedOf:
	case len(u.all) >= maxUnfinished:
		oldest = 0
	default:
		oldest = -1
	}
	if oldest >= 0 {
		out = u.all[oldest]
		u.all = slices.Delete(u.all, oldest, oldest+1)
	}
	u.all = append(u.all, c)
	return out
}

// remove forgets c, and reports whether it was there.
func (u *unfinished) remove(c *conn) bool {
	i := slices.Index(u.all, c)
	if i >= 0 {
		u.all = slices.Delete(u.all, i, i+1)
	}
	return i >= 0
}

// establish counts c among the peers from now on: its handshakes are done. It is false when there is no room for one
// more.
func (s *Swarm) establish(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Contains(s.unfinished.all, c) {
		return true // we dialled it, or it is closed
	}
	if len(s.conns)-len(s.unfinished.all) >= s.cfg.MaxConns {
		return false // it stays among the unfinished until it is closed
	}
	s.unfinished.remove(c)
	c.deadline.Stop()
	return true
}
