package tracker

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"kraken/tracker/dashboard"
)

const (
	// pageFresh is how long a snapshot is shown: however many people look, the state is walked once a second.
	pageFresh = time.Second
	// maxRows bounds the swarms and the nodes that are shown, maxHeld the blobs shown of each node.
	maxRows = 200
	maxHeld = 8
)

// page keeps the last snapshot.
type page struct {
	mu   sync.Mutex
	at   time.Time
	last *dashboard.Snapshot
}

// snapshot is what the page and its JSON show, at most a second old.
func (t *Tracker) snapshot() *dashboard.Snapshot {
	t.page.mu.Lock()
	defer t.page.mu.Unlock()
	if t.page.last == nil || time.Since(t.page.at) >= pageFresh {
		t.page.last, t.page.at = t.store.snapshot(), time.Now()
		for _, o := range t.origins.All() {
			t.page.last.Origins = append(t.page.last.Origins, dashboard.Origin{ID: o.ID, URL: o.URL, Peer: o.Peer})
		}
		t.page.last.Interval = time.Duration(t.cfg.Interval).Seconds()
		t.page.last.StockPeers = t.cfg.StockPeers
	}
	return t.page.last
}

// snapshot walks the state, one swarm at a time.
func (s *store) snapshot() *dashboard.Snapshot {
	out := &dashboard.Snapshot{Time: time.Now().UTC()}
	nodes := map[*peer]*dashboard.Node{}
	swarms := make([]dashboard.Swarm, 0, 64)
	now := s.now()
	for _, d := range slices.Sorted(slices.Values(s.digests())) { // so that rows stay where they are
		s.mu.Lock()
		if w := s.swarms[d]; w != nil {
			if row := s.show(w, nodes, now); row.Seeds+row.Leechers > 0 {
				swarms = append(swarms, row)
			}
		}
		s.mu.Unlock()
	}
	s.mu.Lock()
	for _, p := range s.peers {
		if !p.replaced && !s.expired(p, p.seen, now) {
			s.nodeOf(p, nodes, now)
		}
	}
	s.mu.Unlock()

	for _, w := range swarms {
		out.Seeds += w.Seeds
		out.Leechers += w.Leechers
		out.Bytes += w.Size
	}
	slices.SortFunc(swarms, func(a, b dashboard.Swarm) int { // busy ones first, then the newest
		return cmp.Or(cmp.Compare(b.Leechers, a.Leechers), cmp.Compare(a.Age, b.Age), cmp.Compare(a.Digest, b.Digest))
	})
	all := make([]dashboard.Node, 0, len(nodes))
	for _, n := range nodes {
		all = append(all, *n)
	}
	slices.SortFunc(all, func(a, b dashboard.Node) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.PeerID, b.PeerID))
	})
	out.SwarmCount, out.NodeCount = len(swarms), len(all)
	out.Swarms, out.Nodes = swarms[:min(maxRows, len(swarms))], all[:min(maxRows, len(all))]
	return out
}

// show sums up one swarm and adds to the nodes what they have of it. s.mu is held.
func (s *store) show(w *swarm, nodes map[*peer]*dashboard.Node, now moment) dashboard.Swarm {
	row := dashboard.Swarm{Digest: w.digest.String(), Size: w.size, Age: time.Duration(now - w.since).Seconds()}
	if i := w.hash; i != ([20]byte{}) {
		row.InfoHash = i.String()
	}
	have := 0.0
	for e := range w.all() {
		p := s.roster.peers[e.peer]
		if p.replaced || s.expired(p, e.seen.moment(), now) {
			continue
		}
		part := progress(w.size, int64(e.left))
		have += part
		n := s.nodeOf(p, nodes, now)
		n.Uploaded += int64(e.up)
		n.Downloaded += int64(e.down)
		held := dashboard.Held{Digest: w.digest.String(), Size: w.size, Progress: part}
		if e.left == 0 {
			row.Seeds++
			n.Seeding++
			n.Bytes += w.size
			if len(n.Held) < maxHeld {
				n.Held = append(n.Held, held)
			}
		} else {
			row.Leechers++
			n.Fetching++
			if len(n.Fetches) < maxHeld {
				n.Fetches = append(n.Fetches, held)
			}
		}
	}
	if n := row.Seeds + row.Leechers; n > 0 {
		row.Progress = have / float64(n)
	}
	return row
}

// nodeOf finds or makes the row of a peer. s.mu is held.
func (s *store) nodeOf(p *peer, nodes map[*peer]*dashboard.Node, now moment) *dashboard.Node {
	n := nodes[p]
	if n == nil {
		n = &dashboard.Node{Name: p.node, PeerID: p.id.String(), Stock: p.stock, LastSeen: max(0, time.Duration(now-p.seen)).Seconds()}
		for _, a := range p.addrs {
			if a.IsValid() {
				n.Addr = append(n.Addr, a.String())
			}
		}
		nodes[p] = n
	}
	return n
}

// progress is the part of a blob that is there, 0 to 1.
func progress(size, left int64) float64 {
	switch {
	case left == 0:
		return 1
	case left < 0 || size <= 0 || left > size:
		return 0
	}
	return float64(size-left) / float64(size)
}
