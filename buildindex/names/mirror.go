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
	// MirroredLayer returns what is known of a blob in a repository, ErrNotFound when no known manifest claims it and
	// it is not proved.
	MirroredLayer(ctx context.Context, repo string, d digest.Digest) (MirroredLayer, error)
	// BlobHolders returns up to n repositories after last, in order, that have a blob, be it a manifest, or whose known
	// manifests claim it: the cluster's own, and mirrored ones.
	BlobHolders(ctx context.Context, d digest.Digest, last string, n int) ([]string, error)
	// MirroredReferrers returns the list of a subject's referrers, ErrNotFound when it is not known.
	MirroredReferrers(ctx context.Context, repo string, subject digest.Digest) (MirroredReferrers, error)
	// MirroredTags returns up to n known tags after last, in order.
	MirroredTags(ctx context.Context, repo, last string, n int) ([]string, error)
	// MirroredBytes returns how much is mirrored: the bytes of manifests and lists of referrers, and MirroredRow for
	// each list and proof. Claims are in their manifests' bytes.
	MirroredBytes(ctx context.Context) (int64, error)
	// MirroredUnwritten returns up to n mirrored manifests after last, in order, that are none of the cluster's own.
	MirroredUnwritten(ctx context.Context, last cluster.Name, n int) ([]cluster.Name, error)
	// MirroredTagsUnwritten returns up to n mirrored tags after last, in order of repository and tag, whose manifests
	// are the cluster's own, and that are no tags of the cluster's own, or of other manifests there.
	MirroredTagsUnwritten(ctx context.Context, last cluster.Name, n int) ([]cluster.Name, error)
}

// MirrorTx is what one Update writes of registries outside the cluster.
type MirrorTx interface {
	// PutMirroredTag says what a tag is.
	PutMirroredTag(repo, tag string, t MirroredTag) error
	// DeleteMirroredTag forgets a tag. One that is not there is no error.
	DeleteMirroredTag(repo, tag string) error
	// PutMirroredManifest stores a manifest with its bytes, used now, and the blobs that it claims. Its generation is
	// none.
	PutMirroredManifest(m Manifest, blobs []Member) error
	// ProveMirrored says that the registry itself has said that a repository has a blob.
	ProveMirrored(repo string, blob Member) error
	// UseMirrored says when a mirrored manifest, with the list of its referrers, or the proof of a blob was used last.
	// One that is not there is no error.
	UseMirrored(repo string, d digest.Digest, at time.Time) error
	// PruneMirrored forgets the n mirrored manifests that were used least recently, with their tags, claims and lists
	// of referrers, and as many lists and proofs that were used no later than these. It returns how many there were of
	// all that it chose by use.
	PruneMirrored(n int) (int, error)
	// PutMirroredReferrers says what refers to a subject.
	PutMirroredReferrers(repo string, subject digest.Digest, r MirroredReferrers) error
}

// MirroredRow is what a list of referrers or a proof counts beside its bytes.
const MirroredRow = 256

// MirroredLayer is a blob of an upstream's repository.
type MirroredLayer struct {
	Size int64
	// Proved says that the registry has said that the repository has the blob. Else only a manifest says so, and
	// anybody who may push one there writes into it what he likes.
	Proved bool
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
