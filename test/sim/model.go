package sim

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// name is what a client can read back: a tag, a manifest in a repository, or a membership.
type name struct {
	kind string // tag, manifest or layer
	repo string
	what string // the tag, or the digest
}

func (n name) String() string { return n.kind + " " + n.repo + " " + short(n.what) }

// short cuts digests, which a history is full of.
func short(s string) string {
	if rest, ok := strings.CutPrefix(s, "sha256:"); ok {
		return rest[:6]
	}
	return s
}

// A name has a value: of a tag its digest, of the others there. Absent is none.
const (
	absent = ""
	there  = "there"
)

// state is what is known of a name. What may be read now is in may: the value of the last change that was answered,
// those of changes that were not answered, or not yet, and those of changes that ran at the same time.
type state struct {
	may     map[string]bool
	pending map[*attempt]string // under way, or never answered
	recent  []change            // that were answered
	ever    map[string]bool     // all that it was answered to be
	readers map[*reading]bool
}

type change struct {
	value      string
	began, end time.Time
}

// model knows every answer that was given. It is used by the goroutines of clients, one at a time: the caller locks.
type model struct {
	names map[name]*state
	blobs map[digest.Digest]*acknowledged
	refs  map[string][]digest.Digest // of manifests that were pushed: their blobs
}

// acknowledged is a blob that a client was told is stored.
type acknowledged struct {
	at   time.Time
	need int // copies that must owe it as long as the bucket lacks it
	safe bool
	repo string
}

func newModel() *model {
	return &model{names: map[name]*state{}, blobs: map[digest.Digest]*acknowledged{}, refs: map[string][]digest.Digest{}}
}

func (m *model) of(n name) *state {
	s := m.names[n]
	if s == nil {
		s = &state{may: map[string]bool{absent: true}, pending: map[*attempt]string{}, ever: map[string]bool{}, readers: map[*reading]bool{}}
		m.names[n] = s
	}
	return s
}

// sorted lists all names that were ever written.
func (m *model) sorted() []name {
	return slices.SortedFunc(maps.Keys(m.names), func(a, b name) int { return strings.Compare(a.String()+a.what, b.String()+b.what) })
}

func (s *state) allow(v string) {
	s.may[v] = true
	for r := range s.readers {
		r.may[v] = true
	}
}

// attempt is one request of a client that changes names.
type attempt struct {
	m       *model
	began   time.Time
	changes map[name]string
	deletes name // a manifest whose tags go as well
}

// begin says that the request is on its way: from now on it may have happened.
func (m *model) begin(changes map[name]string) *attempt {
	a := &attempt{m: m, began: time.Now(), changes: changes}
	for n, v := range changes {
		s := m.of(n)
		s.pending[a] = v
		s.allow(v)
	}
	return a
}

// beginDelete is begin for the deletion of a manifest, with which its tags go.
func (m *model) beginDelete(n name) *attempt {
	changes := map[name]string{n: absent}
	for k, s := range m.names {
		if k.kind == "tag" && k.repo == n.repo && s.may[n.what] {
			changes[k] = absent
		}
	}
	a := m.begin(changes)
	a.deletes = n
	return a
}

// acknowledged says that the client was told that the request was done.
func (a *attempt) acknowledged() {
	now := time.Now()
	for n, v := range a.changes {
		s := a.m.of(n)
		delete(s.pending, a)
		may := map[string]bool{v: true}
		if a.deletes.kind != "" && n.kind == "tag" { // only where it had this manifest
			for w := range s.may {
				if w != a.deletes.what {
					may[w] = true
				}
			}
		}
		for _, w := range s.pending {
			may[w] = true
		}
		if n.kind == "tag" && v != absent { // a deletion of the manifest that may still come takes the tag
			for _, w := range a.m.of(name{"manifest", n.repo, v}).pending {
				if w == absent {
					may[absent] = true
				}
			}
		}
		for _, c := range s.recent {
			if c.end.After(a.began) {
				may[c.value] = true
			}
		}
		s.recent = append(s.recent, change{v, a.began, now})
		s.ever[v] = true
		s.may = may
		for w := range may {
			s.allow(w)
		}
	}
}

// refused says that the request was answered, and did nothing.
func (a *attempt) refused() {
	for n := range a.changes {
		delete(a.m.of(n).pending, a)
	}
}

// reading is one read: what it may return is all that the name may have had meanwhile.
type reading struct {
	s   *state
	may map[string]bool
}

func (m *model) beginRead(n name) *reading {
	s := m.of(n)
	r := &reading{s, maps.Clone(s.may)}
	s.readers[r] = true
	return r
}

func (r *reading) end() { delete(r.s.readers, r) }

func (r *reading) String() string { return describe(r.may) }

func describe(may map[string]bool) string {
	var out []string
	for v := range may {
		if v == absent {
			v = "absent"
		}
		out = append(out, short(v))
	}
	slices.Sort(out)
	return fmt.Sprint(out)
}

// settle says that nothing is under way any more, and that a name has a value. A membership whose upload was committed
// by origins, and not acknowledged because build-index was away, may come to be when names are restored.
func (m *model) settle(n name, v string) {
	s := m.of(n)
	may := map[string]bool{v: true}
	if n.kind == "layer" && v == absent {
		for _, w := range s.pending {
			may[w] = true
		}
	}
	s.may, s.recent = may, nil
	if len(may) == 1 {
		s.pending = map[*attempt]string{}
	}
}

// unpublished says that blobs were lost: manifests that refer to one can't be written to the bucket, and may be absent
// once everything else is lost. Tags that name them are then what they were before, or absent.
func (m *model) unpublished(lost func(digest.Digest) bool) {
	gone := map[string]bool{}
	for d, blobs := range m.refs {
		gone[d] = slices.ContainsFunc(blobs, lost)
	}
	for n, s := range m.names {
		switch {
		case n.kind == "manifest" && gone[n.what]:
			s.allow(absent)
		case n.kind == "tag" && slices.ContainsFunc(slices.Collect(maps.Keys(s.may)), func(v string) bool { return gone[v] }):
			s.allow(absent)
			for v := range s.ever {
				s.allow(v)
			}
		}
	}
}
