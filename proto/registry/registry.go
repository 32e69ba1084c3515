// Package registry is the OCI Distribution API v1.1 as a pair: an [http.Handler] over small interfaces ([Server]) and a
// client that implements the same interfaces ([Client]). A registry is a value that stacks: a server over a client is a
// proxy. Every role of a cluster mounts the parts that it answers for: proxy all of it, origin the blob half,
// build-index the manifest half, agent the read half.
//
// The package knows no storage, no membership and no policy. Its errors are the ones of the specification, see [Error].
package registry

import (
	"context"
	"io"
	"os"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// MaxManifest is the largest manifest in bytes that a server takes and a client reads.
// The specification asks registries for at least 4 MiB.
const MaxManifest = 4 << 20

// Media types of Docker's registry API, schema 2. The OCI ones are in image-spec.
const (
	MediaTypeDockerManifest     = "application/vnd.docker.distribution.manifest.v2+json"
	MediaTypeDockerManifestList = "application/vnd.docker.distribution.manifest.list.v2+json"
	MediaTypeDockerForeignLayer = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
)

// Range is a byte range. A negative Length means to the end.
type Range struct{ Offset, Length int64 }

// Whole is the range of a request that asks for all bytes.
var Whole = Range{0, -1}

// Content is an open blob: a File, which a server hands to sendfile, or a Body. Whoever opened it calls Close once.
type Content struct {
	Digest digest.Digest
	Size   int64 // bytes
	File   *os.File
	// Body is read where File is nil. Reads may block while bytes are still arriving. It fails, and never ends clean,
	// when the bytes turn out not to match Digest.
	Body  io.ReadSeeker
	Close func() error
	// Plan, where set, is told before the first read which ranges will be read, in this order, so that no more is asked
	// for elsewhere.
	Plan func([]Range)
}

// Reader returns File or Body, whichever there is.
func (c *Content) Reader() io.ReadSeeker {
	if c.File != nil {
		return c.File
	}
	return c.Body
}

// Blobs is the read half for blobs.
type Blobs interface {
	// StatBlob answers from metadata and never moves blob bytes.
	// ErrBlobUnknown: the blob is nowhere; ErrUnavailable: who may have it could not be asked.
	StatBlob(ctx context.Context, repo string, d digest.Digest) (v1.Descriptor, error)
	// OpenBlob opens d for reading. hint is the range that will be read first; any other may be read as well.
	// ctx bounds the life of the Content.
	OpenBlob(ctx context.Context, repo string, d digest.Digest, hint Range) (*Content, error)
}

// BlobDeleter removes a blob from a repository, ErrBlobUnknown when it is not there.
type BlobDeleter interface {
	DeleteBlob(ctx context.Context, repo string, d digest.Digest) error
}

// Mounter makes a blob that some repository has a member of repo without moving bytes. From, which may be empty, is a
// hint. ErrBlobUnknown: no repository has it, the client is given an upload session instead.
type Mounter interface {
	MountBlob(ctx context.Context, repo, from string, d digest.Digest) (v1.Descriptor, error)
}

// UploadOptions is what is known when an upload session starts.
type UploadOptions struct {
	Digest digest.Digest // empty when not known yet
	Size   int64         // of the whole blob in bytes, -1 when not known yet
	Source string        // whose upload it is, see transport.SourceOf; empty when not known
}

// Upload is the state of an upload session.
type Upload struct {
	// ID is opaque, [A-Za-z0-9_-]+, at most 1,024 bytes from a Server's own Uploads. It may change with each chunk: the
	// last answer's holds.
	ID     string
	Offset int64 // bytes that are safely received
}

// Chunk is one body of an upload. Body may be nil for none.
type Chunk struct {
	Offset int64 // where it starts; -1: at the session's offset, whatever that is
	Length int64 // -1 when the client did not say
	Body   io.Reader
}

// Uploads is the write half for blobs.
//
// ErrBlobUploadUnknown: no such session in this repository. A *RangeError (416) when a chunk does not start at the
// session's offset; the session survives it. After any other error the session's offset is what UploadStatus says.
type Uploads interface {
	StartUpload(ctx context.Context, repo string, o UploadOptions) (Upload, error)
	UploadStatus(ctx context.Context, repo, id string) (Upload, error)
	WriteUpload(ctx context.Context, repo, id string, c Chunk) (Upload, error)
	// CommitUpload writes a last chunk, if any, verifies and makes the blob durable before it returns.
	// ErrDigestInvalid when the bytes are not d: then the session is gone and nothing of it stays.
	CommitUpload(ctx context.Context, repo, id string, d digest.Digest, c Chunk) (v1.Descriptor, error)
	AbortUpload(ctx context.Context, repo, id string) error
}

// Reference names a manifest: exactly one of the two is set.
type Reference struct {
	Tag    string
	Digest digest.Digest
}

func (r Reference) String() string {
	if r.Tag != "" {
		return r.Tag
	}
	return r.Digest.String()
}

// Manifest is a manifest's bytes exactly as they were pushed.
type Manifest struct {
	Digest    digest.Digest
	MediaType string
	Bytes     []byte // nil when GetOptions.Have names this digest
	// Warning, when not empty, is sent as a Warning header (RFC 7234 section 5.5): the answer may be stale.
	Warning string
}

// GetOptions refines a manifest read.
type GetOptions struct {
	// Have is the digest that the caller holds (If-None-Match). When it is still the answer, Bytes is nil.
	Have digest.Digest
}

// Manifests is the read half for manifests. ErrManifestUnknown, ErrUnavailable.
type Manifests interface {
	GetManifest(ctx context.Context, repo string, ref Reference, o GetOptions) (*Manifest, error)
}

// PutOptions refines a manifest write. The conditions are on every tag that is written, or on the manifest when there
// is none; ErrPrecondition when one does not hold.
type PutOptions struct {
	// Tags are set in the same step, for a manifest that is pushed by digest (?tag=, at most MaxTagParameters).
	Tags []string
	// IfMatch, unless nil, are the digests of which the tag must have one now, for compare-and-swap.
	IfMatch []digest.Digest
	// IfNoneMatch are digests of which the tag must have none now.
	IfNoneMatch []digest.Digest
	// IfExists wants the tag to exist (If-Match: *), IfAbsent wants it not to (If-None-Match: *).
	IfExists, IfAbsent bool
	// KeepTags lets the write make tags, and none move: ErrDenied for a tag that is another manifest.
	KeepTags bool
}

// Conditional reports whether the write depends on what is there.
func (o PutOptions) Conditional() bool {
	return o.IfMatch != nil || len(o.IfNoneMatch) > 0 || o.IfExists || o.IfAbsent
}

// MaxTagParameters bounds the tags of one push.
const MaxTagParameters = 100

// PutResult is what a manifest write answers.
type PutResult struct {
	Digest  digest.Digest
	Subject digest.Digest // set when the manifest has a subject: the referrers API will list it
	Tags    []string      // that were set because of PutOptions.Tags
}

// ManifestWriter is the write half for manifests. PutManifest returns when the manifest and the tag are durable.
// ErrManifestInvalid, ErrManifestBlobUnknown, ErrDigestInvalid, ErrUnavailable, ErrPrecondition, ErrDenied.
type ManifestWriter interface {
	PutManifest(ctx context.Context, repo string, ref Reference, mediaType string, raw []byte, o PutOptions) (PutResult, error)
	// DeleteManifest removes a tag, or a manifest with all its tags.
	DeleteManifest(ctx context.Context, repo string, ref Reference) error
}

// Page asks for at most N names after Last, in byte order. N < 0 means as many as the server gives.
type Page struct {
	N    int
	Last string
}

// Names is one page. More says that another one follows.
type Names struct {
	Names []string
	More  bool
	// Next is the Page.Last of the next page, empty for the last of Names.
	Next string
}

// Tags lists the tags of a repository, ErrNameUnknown when there is no such repository.
type Tags interface {
	ListTags(ctx context.Context, repo string, p Page) (Names, error)
}

// Catalog lists the repositories that have a manifest or a blob.
type Catalog interface {
	ListRepositories(ctx context.Context, p Page) (Names, error)
}

// ReferrersPage is one page of the referrers of a digest.
type ReferrersPage struct {
	Descriptors []v1.Descriptor
	Filtered    bool   // the artifactType filter was applied
	Next        string // cursor of the next page, empty on the last
}

// Referrers lists manifests whose subject is d. An unknown d has none, which is no error.
type Referrers interface {
	ListReferrers(ctx context.Context, repo string, d digest.Digest, artifactType, cursor string) (ReferrersPage, error)
}
