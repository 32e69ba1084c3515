package swarm

import (
	"net/netip"
	"sync"
	"time"
)

// Ban is a peer that sent wrong bytes.
type Ban struct {
	Addr   netip.AddrPort // as dialled or announced; of the connection, where neither is known
	ID     [20]byte
	Until  time.Time
	Reason string
}

// bans keeps out peers by address and by id. An IP address alone is no key: hosts, and networks behind one address, are
// shared.
type bans struct {
	time time.Duration
	mu   sync.Mutex
	all  []Ban
}

func (b *bans) add(id [20]byte, addr netip.AddrPort, reason string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.all = append(b.all, Ban{Addr: addr, ID: id, Until: time.Now().Add(b.time), Reason: reason})
}

// has reports whether a peer is banned; the zero id and the zero address match nobody.
func (b *bans) has(id [20]byte, addr netip.AddrPort) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	for _, x := range b.all {
		if now.Before(x.Until) && (x.ID == id && id != [20]byte{} || x.Addr == addr && addr.IsValid()) {
			return true
		}
	}
	return false
}

func (b *bans) expire() {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	kept := b.all[:0]
	for _, x := range b.all {
		if now.Before(x.Until) {
			kept = append(kept, x)
		}
	}
	b.all = kept
}

func (b *bans) list() []Ban {
	b.expire()
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]Ban(nil), b.all...)
}

// ban keeps the peer of a connection out and closes every connection that it has. It takes no lock of the library's.
func (s *Swarm) ban(c *conn, reason string) {
	addr := c.address.addr
	if !c.outgoing && c.t != nil {
		if f := c.t.fetch.Load(); f != nil {
			if a, ok := f.announced(c.id); ok {
				addr = a
			}
		}
	}
	if s.bans.has(c.id, addr) {
		c.Close()
		return
	}
	s.bans.add(c.id, addr, reason)
	s.m.banned.Inc()
	s.log.Warn("peer is banned", "peer", addr, "id", idText(c.id), "reason", reason, "for", s.cfg.BanTime)
	s.mu.Lock()
	var same []*conn
	for x := range s.conns {
		if x == c || x.address.addr == addr {
			same = append(same, x)
		}
	}
	for _, t := range s.loaded {
		same = append(same, t.connsOf(c.id)...)
	}
	s.mu.Unlock()
	for _, x := range same {
		x.Close()
	}
}
