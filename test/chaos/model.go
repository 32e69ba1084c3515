package chaos

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
)

// model is what clients know of the cluster from the answers that they were given.
type model struct {
	repos []*repository

	mu    sync.Mutex
	wrong []string
}

// violation remembers an answer that must not have been given.
func (m *model) violation(format string, args ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wrong = append(m.wrong, fmt.Sprintf(format, args...))
}

// violations returns the answers that must not have been given.
func (m *model) violations() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.wrong)
}

// repository has one writer, which holds mu; readers hold it for reading, so that they see no change under way.
type repository struct {
	name string

	mu     sync.RWMutex
	tags   map[string]*tag
	images map[digest.Digest]*image
}

// gone stands for "not there" among the digests that a tag may have.
const gone digest.Digest = ""

// tag is what a tag may be now: one digest when the last change was answered, several when it was not.
type tag struct {
	may []digest.Digest
	// all that it ever may have been; an agent without build-index may answer so, with a warning
	past map[digest.Digest]bool
}

// image is one manifest in one repository with its blobs.
type image struct {
	digest   digest.Digest
	manifest []byte
	blobs    []blobRef
	state    state
}

type blobRef struct {
	digest digest.Digest
	size   int64
}

// state is whether a manifest is in its repository.
type state int

const (
	unknown state = iota // its push or its deletion was not answered
	present
	deleted
)

func newModel(writers int) *model {
	m := &model{}
	for i := range writers {
		m.repos = append(m.repos, &repository{
			name: fmt.Sprintf("chaos/team-%d", i), tags: map[string]*tag{}, images: map[digest.Digest]*image{},
		})
	}
	return m
}

// begin says that a tag is about to become d. The caller holds mu.
func (r *repository) begin(name string, d digest.Digest) *tag {
	t := r.tags[name]
	if t == nil {
		t = &tag{may: []digest.Digest{gone}, past: map[digest.Digest]bool{gone: true}}
		r.tags[name] = t
	}
	if !slices.Contains(t.may, d) {
		t.may = append(t.may, d)
	}
	t.past[d] = true
	return t
}

// is says that a change of the tag was answered: it is d.
func (t *tag) is(d digest.Digest) { t.may = []digest.Digest{d} }

// pick returns a random image of a state, nil when there is none. The caller holds mu.
func (r *repository) pick(rng *rand.Rand, s state) *image {
	var have []*image
	for _, i := range r.images {
		if i.state == s {
			have = append(have, i)
		}
	}
	if len(have) == 0 {
		return nil
	}
	slices.SortFunc(have, func(a, b *image) int { return cmpDigest(a.digest, b.digest) })
	return have[rng.IntN(len(have))]
}

// pickTag returns a random tag's name, "" when there is none. The caller holds mu.
func (r *repository) pickTag(rng *rand.Rand) string {
	var names []string
	for n := range r.tags {
		names = append(names, n)
	}
	if len(names) == 0 {
		return ""
	}
	slices.Sort(names)
	return names[rng.IntN(len(names))]
}

func cmpDigest(a, b digest.Digest) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}
