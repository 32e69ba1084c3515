package tracker

import (
	"bytes"
	"cmp"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/announce"
	"kraken/proto/blob"
	"kraken/tracker/dashboard"
)

const (
	// pageFresh is how long a snapshot is shown: however many people look, the state is walked once a second.
	pageFresh = time.Second
	// maxRows bounds the swarms and the nodes of one page, maxPages the pages that can be turned to.
	maxRows  = 200
	maxPages = 10
	// maxHeld bounds the blobs shown of each node.
	maxHeld = 8
)

// page keeps the last snapshot.
type page struct {
	mu   sync.Mutex
	at   time.Time
	last *dashboard.Snapshot
}

// snapshot is what a page, from 1, and its JSON show, at most a second old. A page that is not there is the last one.
func (t *Tracker) snapshot(number int) *dashboard.Snapshot {
	t.page.mu.Lock()
	defer t.page.mu.Unlock()
	if t.page.last == nil || time.Since(t.page.at) >= pageFresh {
		t.page.last, t.page.at = t.store.snapshot(), time.Now()
		for _, o := range t.origins.All() {
			t.page.last.Origins = append(t.page.last.Origins, o.Member)
		}
		t.page.last.Interval = time.Duration(t.cfg.Interval).Seconds()
		t.page.last.StockPeers = t.cfg.StockPeers
	}
	out := *t.page.last
	rows := max(len(out.Swarms), len(out.Nodes), 1)
	out.Pages = (rows + maxRows - 1) / maxRows
	out.Page = min(max(1, number), out.Pages)
	out.Swarms, out.Nodes = rowsOf(out.Swarms, out.Page), rowsOf(out.Nodes, out.Page)
	return &out
}

// rowsOf are the rows of one page.
func rowsOf[T any](all []T, page int) []T {
	from := min((page-1)*maxRows, len(all))
	return all[from:min(from+maxRows, len(all))]
}

// first keeps the first n of what is added, in the order of cmp, in little more memory than those take.
type first[T any] struct {
	n    int
	cmp  func(a, b T) int
	rows []T
}

func (f *first[T]) add(v T) {
	if f.rows = append(f.rows, v); len(f.rows) >= 2*f.n {
		f.cut()
	}
}

// cut returns what is kept, in order.
func (f *first[T]) cut() []T {
	slices.SortFunc(f.rows, f.cmp)
	f.rows = f.rows[:min(f.n, len(f.rows))]
	return f.rows
}

// shown is a node with what its row says of it once it is known to be among those that are shown.
type shown struct {
	dashboard.Node
	number number
	id     announce.PeerID
	addrs  [2]netip.AddrPort
}

// crowd is the peers that are believed to be there, by number, and those of them that have rows.
type crowd struct {
	state []presence
	rows  []*shown // in order
	row   map[number]*shown
	count int
}

// presence says whether a peer's entries count, and for how long.
type presence byte

const (
	absent presence = iota
	agent
	stockClient
)

// snapshot walks the state. It holds the lock only to copy from it, a little at a time, and keeps only rows that are
// shown.
func (s *store) snapshot() *dashboard.Snapshot {
	out := &dashboard.Snapshot{Time: time.Now().UTC(), Swarms: []dashboard.Swarm{}}
	now := s.now()
	nodes := s.crowd(now)
	swarms := first[swarmRow]{n: maxRows * maxPages, cmp: func(a, b swarmRow) int { // busy ones first, then the newest
		return cmp.Or(cmp.Compare(b.leechers, a.leechers), cmp.Compare(a.age, b.age), cmp.Compare(a.digest, b.digest))
	}}
	var entries []entry
	for i, d := range s.digests() {
		s.mu.Lock()
		w := s.swarms[d]
		if w == nil {
			s.mu.Unlock()
			continue
		}
		row := swarmRow{digest: d, hash: w.hash, size: w.size, age: time.Duration(now - w.since)}
		entries = append(append(entries[:0], w.seeds.members...), w.leechers.first.members...)
		s.mu.Unlock()
		if s.sum(&row, entries, nodes, now); row.seeds+row.leechers > 0 {
			out.SwarmCount++
			out.Seeds += row.seeds
			out.Leechers += row.leechers
			out.Bytes += row.size
			swarms.add(row)
		}
		if i%atOnce == atOnce-1 {
			runtime.Gosched()
		}
	}
	for _, r := range swarms.cut() {
		out.Swarms = append(out.Swarms, r.shown())
	}
	out.NodeCount = nodes.count
	out.Nodes = make([]dashboard.Node, 0, len(nodes.rows))
	for _, n := range nodes.rows {
		out.Nodes = append(out.Nodes, n.finished())
	}
	return out
}

// finished is the row as it is shown.
func (n *shown) finished() dashboard.Node {
	n.PeerID = n.id.String()
	for _, a := range n.addrs {
		if a.IsValid() {
			n.Addr = append(n.Addr, a.String())
		}
	}
	n.Held, n.Fetches = firstHeld(n.Held), firstHeld(n.Fetches)
	return n.Node
}

// crowd finds the peers that are there. The number of one that is among them is not given to another while the snapshot
// is made: that needs a time without an announce that is longer.
func (s *store) crowd(now moment) *crowd {
	out := &crowd{row: map[number]*shown{}}
	rows := first[*shown]{n: maxRows * maxPages, cmp: func(a, b *shown) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), bytes.Compare(a.id[:], b.id[:]))
	}}
	s.eachPeer(func(p *peer) {
		if p.replaced || p.gone || s.expired(p.stock, p.seen, now) {
			return
		}
		for int(p.number) >= len(out.state) {
			out.state = append(out.state, absent)
		}
		out.state[p.number] = agent
		if p.stock {
			out.state[p.number] = stockClient
		}
		out.count++
		rows.add(&shown{
			Node:   dashboard.Node{Name: p.node, Stock: p.stock, LastSeen: max(0, time.Duration(now-p.seen)).Seconds()},
			number: p.number, id: p.id, addrs: p.addrs,
		})
	})
	out.rows = rows.cut()
	for _, n := range out.rows {
		out.row[n.number] = n
	}
	return out
}

// swarmRow is a swarm's row before anything of it is formatted.
type swarmRow struct {
	digest          digest.Digest
	hash            blob.InfoHash
	size            int64
	age             time.Duration
	seeds, leechers int
	progress        float64
}

func (r swarmRow) shown() dashboard.Swarm {
	out := dashboard.Swarm{
		Digest: r.digest.String(), Size: r.size, Seeds: r.seeds, Leechers: r.leechers, Progress: r.progress, Age: r.age.Seconds(),
	}
	if r.hash != (blob.InfoHash{}) {
		out.InfoHash = r.hash.String()
	}
	return out
}

// sum adds up the entries of one swarm, and adds to the nodes that are shown what they have of it.
func (s *store) sum(row *swarmRow, entries []entry, nodes *crowd, now moment) {
	have := 0.0
	for _, e := range entries {
		if int(e.peer) >= len(nodes.state) {
			continue // it came a moment ago
		}
		state := nodes.state[e.peer]
		if state == absent || s.expired(state == stockClient, e.seen.moment(), now) {
			continue
		}
		part := progress(row.size, int64(e.left))
		have += part
		if e.left == 0 {
			row.seeds++
		} else {
			row.leechers++
		}
		if n := nodes.row[e.peer]; n != nil {
			n.add(row, e, part)
		}
	}
	if n := row.seeds + row.leechers; n > 0 {
		row.progress = have / float64(n)
	}
}

// add counts what the node has of one blob.
func (n *shown) add(row *swarmRow, e entry, part float64) {
	n.Uploaded += int64(e.up)
	n.Downloaded += int64(e.down)
	held := dashboard.Held{Digest: row.digest.String(), Size: row.size, Progress: part}
	if e.left == 0 {
		n.Seeding++
		n.Bytes += row.size
		n.Held = among(n.Held, held)
		return
	}
	n.Fetching++
	n.Fetches = among(n.Fetches, held)
}

// among adds a blob to those of which the first are shown, by digest, so that they stay where they are.
func among(all []dashboard.Held, h dashboard.Held) []dashboard.Held {
	if all = append(all, h); len(all) >= 4*maxHeld {
		all = firstHeld(all)
	}
	return all
}

func firstHeld(all []dashboard.Held) []dashboard.Held {
	slices.SortFunc(all, func(a, b dashboard.Held) int { return cmp.Compare(a.Digest, b.Digest) })
	return all[:min(maxHeld, len(all))]
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
