// Package names says what a build-index keeps and how it changes: repositories, manifests, tags, which repository holds
// which blob, and the outbox of changes that the bucket lacks. Drivers are in folders of their own; namestest is the
// suite that each of them passes.
//
// A condition on what is there is looked at inside the write that depends on it, never only before: several processes
// may write to one database. So is the order of generations: of two changes of a name the one of the higher generation
// wins, whichever comes first, and a deletion counts as a change.
package names

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"

	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// Errors of a Store.
var (
	ErrNotFound    = errors.New("not in the database")
	ErrNewerSchema = errors.New("database was written by a newer version")

	// ErrFull is a write that the database's file system has no room for. Nothing of it is kept.
	ErrFull = errors.New("the database's disk is full")
	// ErrCondition and ErrNewer are the kinds of a Conflict.
	ErrCondition = errors.New("the condition of the write does not hold")
	ErrNewer     = errors.New("the name was changed by a later generation")
)

// Store is one database of names. All methods may be called at once, and several processes may have one database open.
type Store interface {
	Mirror
	// Update does what f writes to tx, all or nothing, and it is durable when Update returns nil. When f returns an
	// error nothing is done and Update returns that error. What has begun is finished also when ctx ends meanwhile. A
	// driver may call f more than once, so f has no other effects than its writes.
	Update(ctx context.Context, f func(tx Tx) error) error

	// Manifest returns the manifest of a digest or that a tag names, ErrNotFound when there is none.
	Manifest(ctx context.Context, repo string, ref registry.Reference) (Manifest, error)
	// StatManifest returns a manifest without its bytes, ErrNotFound when there is none.
	StatManifest(ctx context.Context, repo string, d digest.Digest) (Manifest, error)
	// Tag returns what a tag names, ErrNotFound when there is none.
	Tag(ctx context.Context, repo, tag string) (Version, error)
	// TagsOf returns the tags that name a manifest.
	TagsOf(ctx context.Context, repo string, d digest.Digest) ([]string, error)
	// Deleted returns the generation of the last deletion of a name that was not put again, 0 when there is none.
	Deleted(ctx context.Context, n cluster.Name) (generation int64, err error)
	// Layer returns the membership of a blob in a repository, in any repository when repo is empty; ErrNotFound when it
	// is in none.
	Layer(ctx context.Context, repo string, d digest.Digest) (Layer, error)

	// Layers returns up to n members of a repository whose digests come after last, in the order of digests; none when
	// there is no such repository.
	Layers(ctx context.Context, repo string, last digest.Digest, n int) ([]Member, error)

	// LayerRepositories returns up to n repositories after last, in order, that have a blob.
	LayerRepositories(ctx context.Context, d digest.Digest, last string, n int) ([]string, error)

	// Tags returns up to n tags after last, in order, ErrNotFound when there is no such repository.
	Tags(ctx context.Context, repo, last string, n int) ([]string, error)
	// Repositories returns up to n repositories after last, in order. One exists while it has a manifest or a blob.
	Repositories(ctx context.Context, last string, n int) ([]string, error)
	// Referrers returns up to n manifests after the digest last whose subject is d, in order of their digests.
	Referrers(ctx context.Context, repo string, d digest.Digest, last string, n int) ([]Manifest, error)

	// Outbox returns up to n rows for a bucket, of AllBuckets for all, after a row's id, oldest first.
	Outbox(ctx context.Context, bucket string, after int64, n int) ([]OutboxRow, error)
	// Queued returns the rows of the outbox that are of this generation. Deleting a manifest makes one for each of its
	// tags.
	Queued(ctx context.Context, generation int64) ([]OutboxRow, error)
	// QueuedBefore returns the last row of the outbox whose record has a key (cluster.NameKey) and a lower generation,
	// ErrNotFound when there is none.
	QueuedBefore(ctx context.Context, key string, generation int64) (OutboxRow, error)

	// Refused returns the changes that were refused although an origin may have a record of them, oldest first.
	Refused(ctx context.Context) ([]Refused, error)

	// Access returns the entries of a kind, in the order of names.
	Access(ctx context.Context, kind string) ([]AccessEntry, error)

	// State returns the numbers that describe the database.
	State(ctx context.Context) (State, error)
	// Meta returns a setting, empty when it was never set.
	Meta(ctx context.Context, key string) (string, error)
	// Ping returns nil when the database answers.
	Ping(ctx context.Context) error
	// Close ends the use of the database by this Store.
	Close() error
}

// Tx is what one Update writes. Its methods see what was written before them in the same Update.
type Tx interface {
	MirrorTx
	// Require returns a *Conflict of kind ErrCondition unless c holds for the tag or manifest ref of a repository now.
	Require(repo string, ref registry.Reference, c Condition) error

	// PutManifest stores a manifest with its bytes, or raises the generation of one that is there. A *Conflict of kind
	// ErrNewer says that a later generation has deleted it.
	PutManifest(m Manifest) error
	// DeleteManifest removes a manifest and its tags, and returns these with the generations that they had and that
	// their deletions have. ErrNotFound when it is not there, a *Conflict of kind ErrNewer when a later generation has
	// put it again. The deletion is remembered for ever, also of what is not there, and refuses what is older; that of
	// a tag and of a membership, too.
	DeleteManifest(repo string, d digest.Digest, generation int64) (tags []Tagged, err error)
	// PutTag points a tag at v. A *Conflict of kind ErrNewer says that a later generation has moved or deleted it, or
	// that this generation points it elsewhere; only of two tags of generation 0 the last one written wins.
	PutTag(repo, tag string, v Version) error
	// DeleteTag removes a tag. ErrNotFound and *Conflict as for DeleteManifest.
	DeleteTag(repo, tag string, generation int64) error
	// PutLayer makes a blob a member of a repository, or raises the generation of the membership. A *Conflict of kind
	// ErrNewer says that a later generation has ended it.
	PutLayer(repo string, d digest.Digest, size, generation int64) error
	// DeleteLayer ends a membership. ErrNotFound and *Conflict as for DeleteManifest.
	DeleteLayer(repo string, d digest.Digest, generation int64) error

	// Enqueue adds a change to the outbox of a bucket, without the bytes of a manifest, and raises the last generation
	// to the change's, or by one: it tells what was committed before from what was after, in whatever order.
	Enqueue(bucket string, r cluster.NameRecord) error
	// SetBucket says which bucket's a row of the outbox is. One that is not there is no error.
	SetBucket(id int64, bucket string) error
	// Done removes a row of the outbox. One that is not there is no error.
	Done(id int64) error
	// PutRefused notes that a change was refused. One that is noted stays as it is.
	PutRefused(r Refused) error
	// DropRefused forgets that a change was refused. One that is not noted is no error.
	DropRefused(key string, generation int64) error
	// PutAccess writes an entry, in the place of the one of its kind and name.
	PutAccess(e AccessEntry) error
	// DeleteAccess removes an entry, ErrNotFound when it is not there.
	DeleteAccess(kind, name string) error
	// DropAccess removes the entries that ended before a second since 1970.
	DropAccess(before int64) error
	// RaiseGeneration makes State.LastGeneration at least n.
	RaiseGeneration(n int64) error
	// SetMeta writes a setting.
	SetMeta(key, value string) error
}

// Member is a blob of a repository.
type Member struct {
	Digest digest.Digest
	Size   int64
}

// AccessEntry is something that proxies share of who may come in. Value is JSON; names does not look into it.
type AccessEntry struct {
	Kind, Name string
	Value      []byte
	Expires    int64 // seconds since 1970, 0 for never
}

// NoGeneration is the generation of what has none: names that another registry, or an older version, wrote. Whatever
// has one wins.
const NoGeneration = cluster.NoGeneration

// AllBuckets is no bucket's name, and stands for all of them and for none.
const AllBuckets = "*"

// Version is what a tag names, and the generation of the change that made it so.
type Version struct {
	Digest     digest.Digest
	Generation int64
}

// Tagged is a tag that was deleted with its manifest.
type Tagged struct {
	Tag        string
	Generation int64
}

// Layer is the membership of a blob in a repository.
type Layer struct{ Size, Generation int64 }

// Manifest is a manifest of a repository.
type Manifest struct {
	Repository   string
	Digest       digest.Digest
	MediaType    string
	ArtifactType string
	Subject      digest.Digest // empty for none
	Generation   int64
	Bytes        []byte
}

// OutboxRow is a change that the bucket lacks. Err is set for a row that can't be read.
type OutboxRow struct {
	ID     int64
	Bucket string
	Record cluster.NameRecord
	Err    error
}

// Refused is a change that was refused, of which an origin may have a record.
type Refused struct {
	Repository string
	Key        string // cluster.NameKey of the record
	Generation int64
	Since      int64 // milliseconds since 1970
}

// State describes a database.
type State struct {
	LastGeneration int64 // at least that of any change that was committed, and higher after each Enqueue
	OutboxRows     int
}

// Condition is what must hold of a tag or a manifest when it is written. The zero value always holds.
type Condition struct {
	Exists bool            // it is there
	Absent bool            // it is not there
	OneOf  []digest.Digest // unless nil, it is there and names one of these
	NoneOf []digest.Digest // it is not there, or names none of these
	Fixed  digest.Digest   // unless empty, it is not there or names this: an immutable tag
}

// Holds reports whether the condition holds of a name that is now, empty when it is not there.
func (c Condition) Holds(now digest.Digest) bool {
	exists := now != ""
	switch {
	case (c.Exists || c.OneOf != nil) && !exists, c.Absent && exists:
		return false
	case c.OneOf != nil && !slices.Contains(c.OneOf, now), exists && slices.Contains(c.NoneOf, now):
		return false
	}
	return c.Fixed == "" || !exists || now == c.Fixed
}

// Conflict is the error of a write that was not done because of what is there.
type Conflict struct {
	Kind       error // ErrCondition or ErrNewer
	Repository string
	Name       registry.Reference // a tag, or the digest of a manifest or blob
	Wanted     Condition          // that does not hold, for ErrCondition
	// Now is what is there. Its Digest is empty when nothing is; for ErrNewer its generation is then that of the
	// deletion.
	Now Version
}

// Error implements error.
func (c *Conflict) Error() string {
	now := "does not exist"
	if c.Now.Digest != "" {
		now = "is " + c.Now.Digest.String()
	}
	return fmt.Sprintf("%s of %s %s, of generation %d: %s", c.Name, c.Repository, now, c.Now.Generation, c.Kind)
}

// Unwrap returns the kind.
func (c *Conflict) Unwrap() error { return c.Kind }
