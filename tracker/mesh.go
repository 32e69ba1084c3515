package tracker

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"slices"

	"github.com/opencontainers/go-digest"
)

// mesh is the graph that a swarm's leechers are told to build. Each of its circles orders all members by a hash of their own, and a
// member's neighbours are the one before and the one after it on every circle. So the graph is symmetric (whoever I am given is
// given me), connected (a single circle is), of bounded degree, and stable: who joins or leaves changes one place on each circle. The
// union of a few random cycles is an expander with high probability (Friedman, "A proof of Alon's second eigenvalue
// conjecture", 2008), so that pieces reach everybody in few hops.
//
// It is made of peer ids and the digest only: a tracker that restarts hands out the same graph again.
type mesh struct {
	salt    uint64
	degree  int
	circles []circle // nil while there is no member
}

// newMesh hands out at most degree neighbours.
func newMesh(d digest.Digest, degree int) mesh { return mesh{salt: saltOf(d), degree: degree} }

func (m *mesh) len() int {
	if m.circles == nil {
		return 0
	}
	return len(m.circles[0].members)
}

func (m *mesh) add(p *peer) {
	if m.circles == nil {
		m.circles = make([]circle, max(1, m.degree/2))
		for i := range m.circles {
			m.circles[i].salt = mix(m.salt + uint64(i))
		}
	}
	for i := range m.circles {
		m.circles[i].add(p)
	}
}

func (m *mesh) remove(p *peer) {
	for i := range m.circles {
		m.circles[i].remove(p)
	}
	if m.len() == 0 {
		m.circles = nil
	}
}

// neighbours are the members that p should be connected to; all others when there are few. For p outside of the mesh they are
// the ones that it would have there.
func (m *mesh) neighbours(p *peer) []*peer {
	if m.circles == nil {
		return nil
	}
	out := make([]*peer, 0, m.degree+2)
	add := func(n *peer) {
		if n != p && !slices.Contains(out, n) {
			out = append(out, n)
		}
	}
	if first := m.circles[0]; len(first.members) <= m.degree+1 {
		for _, n := range first.members {
			add(n)
		}
		return out
	}
	for i := range m.circles {
		before, after := m.circles[i].around(p)
		add(before)
		add(after)
	}
	return out
}

// window is how many members of a circle are looked at to pick some: enough to spread the load evenly, however many there are.
const window = 160

// circle orders members by a hash; the last one is before the first.
type circle struct {
	salt    uint64
	members []*peer
}

func (c *circle) compare(a, b *peer) int {
	return cmp.Or(cmp.Compare(mix(a.hash^c.salt), mix(b.hash^c.salt)), bytes.Compare(a.id[:], b.id[:]))
}

func (c *circle) find(p *peer) (int, bool) { return slices.BinarySearchFunc(c.members, p, c.compare) }

func (c *circle) add(p *peer) {
	if i, found := c.find(p); !found {
		c.members = slices.Insert(c.members, i, p)
	}
}

func (c *circle) remove(p *peer) {
	if i, found := c.find(p); found {
		c.members = slices.Delete(c.members, i, i+1)
	}
}

// around are the members before and after the place of p, which need not be one. The circle has at least two members.
func (c *circle) around(p *peer) (before, after *peer) {
	n := len(c.members)
	i, found := c.find(p)
	after = c.members[i%n]
	if found {
		after = c.members[(i+1)%n]
	}
	return c.members[(i+n-1)%n], after
}

// pick chooses at most n members for p: those whose id scores best with p's (rendezvous), of the window that follows p's place.
// Each p gets its own, the same ones every time, and every member is given to about as many. usable leaves some out.
func (c *circle) pick(p *peer, n int, usable func(*peer) bool) []*peer {
	if n <= 0 || len(c.members) == 0 {
		return nil
	}
	type scored struct {
		p     *peer
		score uint64
	}
	all := make([]scored, 0, window)
	start, _ := c.find(p)
	for i := range min(window, len(c.members)) {
		if q := c.members[(start+i)%len(c.members)]; q != p {
			all = append(all, scored{q, mix(p.hash ^ q.hash ^ c.salt)})
		}
	}
	slices.SortFunc(all, func(a, b scored) int { return cmp.Compare(a.score, b.score) })
	out := make([]*peer, 0, min(n, len(all)))
	for _, s := range all {
		if len(out) < n && usable(s.p) {
			out = append(out, s.p)
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
