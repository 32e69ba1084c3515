package tracker

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"slices"

	"github.com/opencontainers/go-digest"
)

// mesh is the graph that a swarm's leechers are told to build. Each of its circles orders all members by a hash of
// their own, and a member's neighbours are the one before and the one after it on every circle. So the graph is
// symmetric (whoever I am given is given me), connected (a single circle is), of bounded degree, and stable: who joins
// or leaves changes one place on each circle. The union of a few random cycles is an expander with high probability
// (Friedman, "A proof of Alon's second eigenvalue conjecture", 2008), so that pieces reach everybody in few hops.
//
// Random cycles of few members have many edges in common: of 30 that 32 members could have each, 20 would be left. So
// while there are at most twice degree, neighbours are the nearest on one circle instead, degree of them (one less if
// that is odd), about half of all or more.
//
// It is made of peer ids and the digest only: a tracker that restarts hands out the same graph again.
type mesh struct {
	salt   uint64
	degree int
	first  circle[entry] // the members with what they said
	// more are the other circles. They are not there while members are few: most swarms of a cluster are like that most
	// of the time.
	more []circle[number]
}

// newMesh hands out at most degree neighbours.
func newMesh(d digest.Digest, degree int) mesh {
	m := mesh{salt: saltOf(d), degree: degree}
	m.first.salt = mix(m.salt)
	return m
}

func (m *mesh) len() int { return len(m.first.members) }

// complete reports whether everybody is given everybody.
func (m *mesh) complete() bool { return m.len() <= m.degree+1 }

// few reports whether neighbours are the nearest on the first circle.
func (m *mesh) few() bool { return m.len() <= 2*m.degree }

func (m *mesh) entry(r *roster, p *peer) *entry {
	if i, found := m.first.find(r, p); found {
		return &m.first.members[i]
	}
	return nil
}

func (m *mesh) add(r *roster, e entry) {
	m.first.add(r, e)
	switch {
	case m.more != nil:
		for i := range m.more {
			m.more[i].add(r, e.peer)
		}
	case !m.few():
		m.more = make([]circle[number], max(1, m.degree/2)-1)
		for i := range m.more {
			m.more[i].salt = mix(m.salt + uint64(i+1))
			for _, e := range m.first.members {
				m.more[i].add(r, e.peer)
			}
		}
	}
}

func (m *mesh) remove(r *roster, p *peer) {
	m.first.remove(r, p)
	for i := range m.more {
		m.more[i].remove(r, p)
	}
	m.settle()
}

// forget removes many.
func (m *mesh) forget(gone map[number]bool) {
	m.first.forget(gone)
	for i := range m.more {
		m.more[i].forget(gone)
	}
	m.settle()
}

// settle gives up the other circles, later than they were made: members come and go.
func (m *mesh) settle() {
	if m.len() <= m.degree {
		m.more = nil
	}
}

// neighbours are the members that p should be connected to; all others while the mesh is complete. For p outside of the
// mesh they are the ones that it would have there.
func (m *mesh) neighbours(r *roster, p *peer) []*entry {
	if m.len() == 0 {
		return nil
	}
	out := make([]*entry, 0, m.degree+2)
	add := func(e *entry) {
		if r.peers[e.peer] != p && !slices.Contains(out, e) {
			out = append(out, e)
		}
	}
	if m.complete() {
		for i := range m.first.members {
			add(&m.first.members[i])
		}
		return out
	}
	if m.few() {
		n := m.len()
		before, after := m.first.around(r, p)
		for k := range max(1, m.degree/2) {
			add(&m.first.members[(before-k+n)%n])
			add(&m.first.members[(after+k)%n])
		}
		return out
	}
	before, after := m.first.around(r, p)
	add(&m.first.members[before])
	add(&m.first.members[after])
	for i := range m.more {
		c := &m.more[i]
		before, after := c.around(r, p)
		add(m.entry(r, r.peers[c.members[before]]))
		add(m.entry(r, r.peers[c.members[after]]))
	}
	return out
}

// window is how many members of a circle are looked at to pick some: enough to spread the load evenly, however many
// there are.
const window = 160

// member is somebody on a circle.
type member interface {
	entry | number
	who() number
}

func (n number) who() number { return n }

// circle orders members by a hash; the last one is before the first.
type circle[M member] struct {
	salt    uint64
	members []M
}

// find is the place of p, and whether it is there.
func (c *circle[M]) find(r *roster, p *peer) (int, bool) {
	at := mix(p.hash ^ c.salt)
	return slices.BinarySearchFunc(c.members, at, func(m M, at uint64) int {
		q := r.peers[m.who()]
		if order := cmp.Compare(mix(q.hash^c.salt), at); order != 0 {
			return order
		}
		return bytes.Compare(q.id[:], p.id[:])
	})
}

func (c *circle[M]) add(r *roster, m M) {
	i, found := c.find(r, r.peers[m.who()])
	if found {
		return
	}
	if n := len(c.members); n == cap(c.members) {
		c.members = resized(c.members, n+n/8+1)
	}
	c.members = slices.Insert(c.members, i, m)
}

func (c *circle[M]) remove(r *roster, p *peer) {
	if i, found := c.find(r, p); found {
		c.members = slices.Delete(c.members, i, i+1)
		c.settle()
	}
}

// forget removes many.
func (c *circle[M]) forget(gone map[number]bool) {
	c.members = slices.DeleteFunc(c.members, func(m M) bool { return gone[m.who()] })
	c.settle()
}

// settle gives memory back once half of it is unused.
func (c *circle[M]) settle() {
	if n := len(c.members); n < cap(c.members)/2 {
		c.members = resized(c.members, n)
	}
}

// resized is a copy with room for n, or the few more that take no more memory. append would double what is short: that
// is quicker to fill and leaves a quarter of all memory unused, for as long as the swarm stays what it is.
func resized[M any](s []M, n int) []M {
	return append(slices.Grow([]M(nil), n), s...)
}

// around are the places of the members before and after p, which need not be one. The circle has at least two members.
func (c *circle[M]) around(r *roster, p *peer) (before, after int) {
	n := len(c.members)
	i, found := c.find(r, p)
	after = i % n
	if found {
		after = (i + 1) % n
	}
	return (i + n - 1) % n, after
}

// pick chooses at most n members of c for p: those whose id scores best with p's (rendezvous), of the window that
// follows p's place. Each p gets its own, the same ones every time, and every member is given to about as many. usable
// leaves some out.
func pick(c *circle[entry], r *roster, p *peer, n int, usable func(*entry) bool) []*entry {
	if n <= 0 || len(c.members) == 0 {
		return nil
	}
	type scored struct {
		e     *entry
		score uint64
	}
	all := make([]scored, 0, window)
	start, _ := c.find(r, p)
	for i := range min(window, len(c.members)) {
		e := &c.members[(start+i)%len(c.members)]
		if q := r.peers[e.peer]; q != p {
			all = append(all, scored{e, mix(p.hash ^ q.hash ^ c.salt)})
		}
	}
	slices.SortFunc(all, func(a, b scored) int { return cmp.Compare(a.score, b.score) })
	out := make([]*entry, 0, min(n, len(all)))
	for _, s := range all {
		if len(out) < n && usable(s.e) {
			out = append(out, s.e)
		}
	}
	return out
}

// saltOf makes each swarm's graph another one.
func saltOf(d digest.Digest) uint64 {
	h := uint64(14695981039346656037) // FNV-1a
	for i := range len(d) {
		h = (h ^ uint64(d[i])) * 1099511628211
	}
	return mix(h)
}

// mix is the finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
func mix(z uint64) uint64 {
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// hashOf spreads peer ids, which share their first half.
func hashOf(id [20]byte) uint64 {
	return mix(mix(mix(binary.BigEndian.Uint64(id[:8]))+binary.BigEndian.Uint64(id[8:16])) + uint64(binary.BigEndian.Uint32(id[16:])))
}
