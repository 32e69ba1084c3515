package tracker

import (
	"bytes"
	"cmp"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"time"

	"kraken/proto/announce"
	"kraken/proto/blob"
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

// shown is a node with what its row says of it once it is known to be among those that are shown.
type shown struct {
	dashboard.Node
	id    announce.PeerID
	addrs [2]netip.AddrPort
}

// snapshot walks the state. It holds the lock only to copy from it, a little at a time.
func (s *store) snapshot() *dashboard.Snapshot {
	out := &dashboard.Snapshot{Time: time.Now().UTC()}
	now := s.now()
	nodes := s.nodes(now)
	swarms := make([]dashboard.Swarm, 0, 64)
	var entries []entry
	digests := s.digests()
	slices.Sort(digests) // so that rows stay where they are
	for i, d := range digests {
		s.mu.Lock()
		w := s.swarms[d]
		if w == nil {
			s.mu.Unlock()
			continue
		}
		row := dashboard.Swarm{Digest: d.String(), Size: w.size, Age: time.Duration(now - w.since).Seconds()}
		hash := w.hash
		entries = append(append(entries[:0], w.seeds.members...), w.leechers.first.members...)
		s.mu.Unlock()
		if hash != (blob.InfoHash{}) {
			row.InfoHash = hash.String()
		}
		if s.show(&row, entries, nodes, now); row.Seeds+row.Leechers > 0 {
			swarms = append(swarms, row)
		}
		if i%atOnce == atOnce-1 {
			runtime.Gosched()
		}
	}
	for _, w := range swarms {
		out.Seeds += w.Seeds
		out.Leechers += w.Leechers
		out.Bytes += w.Size
	}
	slices.SortFunc(swarms, func(a, b dashboard.Swarm) int { // busy ones first, then the newest
		return cmp.Or(cmp.Compare(b.Leechers, a.Leechers), cmp.Compare(a.Age, b.Age), cmp.Compare(a.Digest, b.Digest))
	})
	nodes = slices.DeleteFunc(nodes, func(n *shown) bool { return n == nil })
	slices.SortFunc(nodes, func(a, b *shown) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), bytes.Compare(a.id[:], b.id[:]))
	})
	out.SwarmCount, out.NodeCount = len(swarms), len(nodes)
	out.Swarms = swarms[:min(maxRows, len(swarms))]
	out.Nodes = make([]dashboard.Node, 0, min(maxRows, len(nodes)))
	for _, n := range nodes[:min(maxRows, len(nodes))] {
		n.PeerID = n.id.String()
		for _, a := range n.addrs {
			if a.IsValid() {
				n.Addr = append(n.Addr, a.String())
			}
		}
		out.Nodes = append(out.Nodes, n.Node)
	}
	return out
}

// nodes are the peers that are believed to be there, by number; nil for the others. The number of one that is among them is not given
// to another while the snapshot is made: that needs a time without an announce that is longer.
func (s *store) nodes(now moment) []*shown {
	var out []*shown
	s.eachPeer(func(p *peer) {
		if p.replaced || s.expired(p.stock, p.seen, now) {
			return
		}
		for int(p.number) >= len(out) {
			out = append(out, nil)
		}
		out[p.number] = &shown{
			Node: dashboard.Node{Name: p.node, Stock: p.stock, LastSeen: max(0, time.Duration(now-p.seen)).Seconds()}, id: p.id, addrs: p.addrs,
		}
	})
	return out
}

// show sums up the entries of one swarm, and adds to the nodes what they have of it.
func (s *store) show(row *dashboard.Swarm, entries []entry, nodes []*shown, now moment) {
	have := 0.0
	for _, e := range entries {
		if int(e.peer) >= len(nodes) {
			continue // it came a moment ago
		}
		n := nodes[e.peer]
		if n == nil || s.expired(n.Stock, e.seen.moment(), now) {
			continue
		}
		part := progress(row.Size, int64(e.left))
		have += part
		n.Uploaded += int64(e.up)
		n.Downloaded += int64(e.down)
		held := dashboard.Held{Digest: row.Digest, Size: row.Size, Progress: part}
		if e.left == 0 {
			row.Seeds++
			n.Seeding++
			n.Bytes += row.Size
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
