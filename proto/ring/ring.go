// Package ring says who owns a digest: rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to
// increase hit rates", 1998) over configured member ids. It is pure: who is alive is the caller's knowledge.
//
// A member's score for a digest is the first 8 bytes, big-endian, of SHA-256(id, 0x00, digest), with the digest in its
// text form. Members are ordered by descending score, ties by id. This is part of the wire: every role must compute the
// same order, see the golden values in the tests.
package ring

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"slices"

	"github.com/opencontainers/go-digest"
)

// Ring is an immutable set of member ids with a number of replicas.
type Ring struct {
	ids      []string
	replicas int
}

// New returns a ring of the given ids, duplicates removed. replicas is the number of owners of a digest, at least 1.
func New(ids []string, replicas int) *Ring {
	ids = slices.Clone(ids)
	slices.Sort(ids)
	return &Ring{ids: slices.Compact(ids), replicas: max(1, replicas)}
}

// Members returns all ids, sorted.
func (r *Ring) Members() []string { return slices.Clone(r.ids) }

// Replicas returns the number of owners of a digest.
func (r *Ring) Replicas() int { return r.replicas }

// Order returns all ids in rendezvous order for d: owners first, then the order in which to look further.
func (r *Ring) Order(d digest.Digest) []string {
	type scored struct {
		id    string
		score uint64
	}
	s := make([]scored, len(r.ids))
	for i, id := range r.ids {
		s[i] = scored{id, score(id, d)}
	}
	slices.SortFunc(s, func(a, b scored) int {
		return cmp.Or(cmp.Compare(b.score, a.score), cmp.Compare(a.id, b.id))
	})
	out := make([]string, len(s))
	for i := range s {
		out[i] = s[i].id
	}
	return out
}

// Owners returns the ids that own d, at most Replicas of them, best first.
func (r *Ring) Owners(d digest.Digest) []string {
	o := r.Order(d)
	return o[:min(r.replicas, len(o))]
}

// Owns reports whether id is among the owners of d.
func (r *Ring) Owns(id string, d digest.Digest) bool { return slices.Contains(r.Owners(d), id) }

func score(id string, d digest.Digest) uint64 {
	b := make([]byte, 0, len(id)+1+len(d))
	b = append(b, id...)
	b = append(b, 0)
	b = append(b, d...)
	sum := sha256.Sum256(b)
	return binary.BigEndian.Uint64(sum[:8])
}

// Member is a configured origin, also in what a tracker answers and shows: the id decides what it owns, the addresses
// only where it is reached.
type Member struct {
	ID   string `yaml:"id" json:"id"`               // e.g. origin-01, stable for ever
	URL  string `yaml:"url" json:"url"`             // of its registry API, e.g. http://127.0.0.1:16031
	Peer string `yaml:"peer" json:"peer,omitempty"` // host:port of its peer listener
}
