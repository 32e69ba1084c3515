package cluster

import (
	"fmt"

	"github.com/opencontainers/go-digest"
)

// Act is what a change does to a name.
type Act uint8

// The acts.
const (
	Put Act = 1 + iota
	Delete
)

// String returns "put" or "delete".
func (a Act) String() string {
	switch a {
	case Put:
		return "put"
	case Delete:
		return "delete"
	}
	return fmt.Sprintf("act %d", uint8(a))
}

// NameKind is what a name is: a tag, a manifest of a repository, or the membership of a blob in a repository.
type NameKind uint8

// The kinds of names.
const (
	Tag NameKind = 1 + iota
	Manifest
	Membership
)

// String returns "tag", "manifest" or "layer", which is what memberships are called on the wire.
func (k NameKind) String() string {
	switch k {
	case Tag:
		return "tag"
	case Manifest:
		return "manifest"
	case Membership:
		return "layer"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Name is a name that changes: a tag, or a manifest or blob by its digest, in a repository. Names compare with ==, and
// are keys of maps.
type Name struct {
	Kind       NameKind
	Repository string
	Tag        string        // of a tag, else empty
	Digest     digest.Digest // of a manifest or a blob, else empty
}

// TagName is the name of a tag.
func TagName(repo, tag string) Name { return Name{Kind: Tag, Repository: repo, Tag: tag} }

// ManifestName is the name of a manifest in a repository.
func ManifestName(repo string, d digest.Digest) Name {
	return Name{Kind: Manifest, Repository: repo, Digest: d}
}

// MembershipName is the name of a blob's membership in a repository.
func MembershipName(repo string, d digest.Digest) Name {
	return Name{Kind: Membership, Repository: repo, Digest: d}
}

// String returns the name as people read it, "tag v1 of repo/app".
func (n Name) String() string {
	what := n.Tag
	if n.Kind != Tag {
		what = n.Digest.String()
	}
	return fmt.Sprintf("%s %s of %s", n.Kind, what, n.Repository)
}

// Change is one change of one name: it is put or deleted. Of two changes of a name the one of the higher generation
// wins, wherever they meet: in SQL, in records at origins, in the bucket.
type Change struct {
	Name
	Act Act
	// Target is the manifest that a tag names when it is put, else empty.
	Target digest.Digest
	// Generation is in microseconds since 1970, or one more than the last. NoGeneration loses to every other.
	Generation int64
}

// NoGeneration is the generation of what has none: blobs that were pushed, and names that another registry wrote.
const NoGeneration = 0

// PutTag makes a tag name a manifest. Its generation is set by At.
func PutTag(repo, tag string, target digest.Digest) Change {
	return Change{Name: TagName(repo, tag), Act: Put, Target: target}
}

// PutName puts a manifest into a repository, or makes a blob a member of one. Its generation is set by At.
func PutName(n Name) Change { return Change{Name: n, Act: Put} }

// DeleteName deletes a name. Its generation is set by At.
func DeleteName(n Name) Change { return Change{Name: n, Act: Delete} }

// At returns the change with a generation.
func (c Change) At(generation int64) Change {
	c.Generation = generation
	return c
}

// PutsManifest reports whether c is the push of a manifest, by a tag or by its digest.
func (c Change) PutsManifest() bool { return c.Act == Put && (c.Kind == Tag || c.Kind == Manifest) }

// Wins reports whether c is what stays when both were made to one name: the higher generation. Of one generation, which
// no two changes of one name should have, a deletion stays where the other is a put, and of two puts of a tag the one
// of the greater digest, so that all places agree whatever comes first. Changes of different names, and one change
// twice, win over nothing.
func (c Change) Wins(other Change) bool {
	switch {
	case c.Name != other.Name:
		return false
	case c.Generation != other.Generation:
		return c.Generation > other.Generation
	case c.Act != other.Act:
		return c.Act == Delete
	}
	return c.Target > other.Target
}

// String returns the change as people read it, "put tag v1 of repo/app at 17".
func (c Change) String() string { return fmt.Sprintf("%s %s at %d", c.Act, c.Name, c.Generation) }

// Latest is the change that wins of each name.
type Latest map[Name]Change

// Add takes c, unless one that it has of the same name stays.
func (l Latest) Add(c Change) {
	if old, ok := l[c.Name]; !ok || c.Wins(old) {
		l[c.Name] = c
	}
}

// Beats reports whether l has a change of the same name that wins over c.
func (l Latest) Beats(c Change) bool {
	old, ok := l[c.Name]
	return ok && old.Wins(c)
}

// Has reports whether l has a change of a name.
func (l Latest) Has(n Name) bool {
	_, ok := l[n]
	return ok
}
