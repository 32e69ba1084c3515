package names

import (
	"context"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/cluster"
)

// Mirror is what a database keeps of registries outside the cluster: what they said last, and when. None of it has a
// generation, is in the outbox, or is restored: it can be asked for again. It is apart from the cluster's own names, so
// that a mirrored membership, whose bytes may be nowhere in the cluster, is none that can be mounted.
type Mirror interface {
	// MirroredTag returns what a tag is, ErrNotFound when it is not known.
	MirroredTag(ctx context.Context, repo, tag string) (MirroredTag, error)
	// MirroredManifest returns a manifest, ErrNotFound when it is not known.
	MirroredManifest(ctx context.Context, repo string, d digest.Digest) (Manifest, error)
	// MirroredLayer returns the size of a blob that a known manifest of the repository refers to, ErrNotFound when none
	// does.
	MirroredLayer(ctx context.Context, repo string, d digest.Digest) (size int64, err error)
	// MirroredReferrers returns the list of a subject's referrers, ErrNotFound when it is not known.
	MirroredReferrers(ctx context.Context, repo string, subject digest.Digest) (MirroredReferrers, error)
	// MirroredTags returns up to n known tags after last, in order.
	MirroredTags(ctx context.Context, repo, last string, n int) ([]string, error)
	// MirroredBytes returns the bytes of all mirrored manifests.
	MirroredBytes(ctx context.Context) (int64, error)
	// MirroredUnwritten returns up to n mirrored manifests after last, in order, that are none of the cluster's own.
	MirroredUnwritten(ctx context.Context, last cluster.Name, n int) ([]cluster.Name, error)
	// MirroredTagsUnwritten returns up to n mirrored tags whose manifests are the cluster's own, and that are no tags
	// of the cluster's own, or of other manifests there.
	MirroredTagsUnwritten(ctx context.Context, n int) ([]cluster.Name, error)
}

// MirrorTx is what one Update writes of registries outside the cluster.
type MirrorTx interface {
	// PutMirroredTag says what a tag is.
	PutMirroredTag(repo, tag string, t MirroredTag) error
	// DeleteMirroredTag forgets a tag. One that is not there is no error.
	DeleteMirroredTag(repo, tag string) error
	// PutMirroredManifest stores a manifest with its bytes, used now, and the blobs that it refers to. Its generation
	// is none.
	PutMirroredManifest(m Manifest, blobs []Member) error
	// UseMirrored says when a mirrored manifest was used last. One that is not there is no error.
	UseMirrored(repo string, d digest.Digest, at time.Time) error
	// PruneMirrored forgets the n mirrored manifests that were used least recently, with their tags and lists of
	// referrers, and returns how many there were. Memberships go with a repository's last one.
	PruneMirrored(n int) (int, error)
	// PutMirroredReferrers says what refers to a subject.
	PutMirroredReferrers(repo string, subject digest.Digest, r MirroredReferrers) error
}

// MirroredTag is what a registry said of a tag.
type MirroredTag struct {
	Digest  digest.Digest
	Checked time.Time // to the millisecond
}

// MirroredReferrers is what a registry said refers to a manifest.
type MirroredReferrers struct {
	Descriptors []v1.Descriptor
	Checked     time.Time // to the millisecond
}
