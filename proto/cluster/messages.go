package cluster

import (
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/registry"
)

// Limits of extension messages.
const (
	MaxDurableDigests = 10_000
	MaxDebt           = 1000 // repositories in one Debt
	MaxLeasePieces    = 256
	MaxArrivingHashes = 4096
	MaxMetainfo       = 64 << 20 // bytes of an encoded metainfo
	MaxNameRecord     = registry.MaxManifest*2 + 64<<10
)

// AnyRepository stands in a path that needs a repository, for a blob that is asked for by its digest alone: an origin's
// bytes are global, and the name only says which bucket is asked first. It is a valid name like any other.
const AnyRepository = "kraken"

// LeaseRequest asks an origin for pieces to fetch from it (POST lease/<digest>).
type LeaseRequest struct {
	// peer id, at most 40 hex digits: whose turn it is; an origin forgets it after seconds
	Peer string `json:"peer"`
	// bitmap of the pieces that the agent has or will get from peers, BEP 3 bit order
	Have []byte `json:"have"`
	Want []int  `json:"want,omitempty"` // pieces that a reader waits for, most urgent first
	Max  int    `json:"max"`            // at most so many pieces, 1..MaxLeasePieces
	// Alone says that the agent knows no other that might have pieces: the first of Want is not left to trade although
	// it was sent lately.
	Alone bool `json:"alone,omitempty"`
	// Stalled says that nothing has come to the agent for its stall timeout: where nothing else is to be leased,
	// any missing piece is, although it was sent lately.
	Stalled bool `json:"stalled,omitempty"`
	// Only says that the agent leases this blob from no other origin, so that no piece is left to one.
	Only bool `json:"only,omitempty"`
}

// LeaseResponse names pieces that the agent should fetch now with ranged GETs of the blob.
type LeaseResponse struct {
	Pieces []int `json:"pieces"`
	// Expires is how long the lease holds; a piece not fetched by then is given to another.
	Expires time.Duration `json:"expires_ns"`
	// RetryAfter is when to ask again when there were fewer pieces than asked for.
	RetryAfter time.Duration `json:"retry_after_ns,omitempty"`
	// HeldBack says that nothing is leased because who asks has leases that it did not fetch in time. After a few
	// such answers an agent reads without leases, which shows that it fetches.
	HeldBack bool `json:"held_back,omitempty"`
}

// Arriving is how far a blob is that an origin fetches from elsewhere (GET arriving/<digest>), or has.
type Arriving struct {
	Origin string `json:"origin"` // id of the origin that fetches it: it leases and serves what has come
	Size   int64  `json:"size"`   // of the blob, in bytes; 0 while Pending, and where it is Passed
	// Pending says that where the blob comes from has not said how large it is: the same question waits for that.
	Pending bool `json:"pending,omitempty"`
	// Passed says that origins pass the blob on and don't keep it: it can be read, and not be leased.
	Passed bool `json:"passed,omitempty"`
	// Whole says that it is there, and was verified: its metainfo can be had.
	Whole bool `json:"whole,omitempty"`
	// Received is how many bytes have come to the origin; it begins anew where another origin takes the blob over.
	Received int64 `json:"received,omitempty"`
	From     int   `json:"from,omitempty"` // the piece that the first of Hashes is of
	// Hashes are the SHA-1 hashes, 20 bytes each, of pieces that have come, at most MaxArrivingHashes. They are not
	// verified before the blob is whole.
	Hashes []byte `json:"hashes,omitempty"`
}

// ArrivingRequest is the query of GET arriving/<digest>.
type ArrivingRequest struct {
	// From is the piece from which on hashes are asked for.
	From int
	// Wait makes the answer wait for a hash, or the end, for up to a second.
	Wait bool
	// Here makes the origin fetch the blob itself and not have another one do it. Origins ask each other so.
	Here bool
}

// DurableRequest asks an origin which blobs are in the bucket of the repository (POST durable).
type DurableRequest struct {
	Digests []digest.Digest `json:"digests"`
}

// DurableResponse divides the digests asked for. Pending ones are held here and on their way; Unknown ones may be at
// others.
type DurableResponse struct {
	Durable []digest.Digest `json:"durable"`
	Pending []digest.Digest `json:"pending"`
	Unknown []digest.Digest `json:"unknown"`
}

// PendingBlob is a blob that an origin holds and has not written back yet, or one that it has written back lately, of
// whose repositories a build-index may not have told other places yet.
type PendingBlob struct {
	Digest       digest.Digest `json:"digest"`
	Size         int64         `json:"size"`
	Repositories []string      `json:"repositories"`
	Since        time.Time     `json:"since,omitzero"`
	Paid         time.Time     `json:"paid,omitzero"` // when the bucket had it; zero: not yet
}

// Debt is what an origin owes the bucket of a blob that it holds whole (GET, PUT debt/<digest>): the blob, and a link
// for each of the repositories.
type Debt struct {
	Repositories []string  `json:"repositories"`
	Since        time.Time `json:"since"`
	Size         int64     `json:"size"` // of the blob, in bytes
	// Leaving says that who hands the debt over drops its copy then: the other hashes its own first.
	Leaving bool `json:"leaving,omitempty"`
}

// WritebackStatus is GET /writeback of an origin's admin listener, and of a build-index's for its outbox.
type WritebackStatus struct {
	Pending int    `json:"pending"` // blobs, or outbox rows, that are not in the bucket yet
	Names   int    `json:"names"`   // name records that are held
	Oldest  string `json:"oldest,omitempty"`
	Error   string `json:"error,omitempty"` // of the last try
	// SetAside are changes and name records that can't go on for a reason of their own, while others do; at most
	// MaxSetAside are listed.
	SetAside []SetAside `json:"set_aside,omitempty"`
	// SetAsideCount is how many there are.
	SetAsideCount int `json:"set_aside_count,omitempty"`
	// Buckets tells of each configured bucket how it answers.
	Buckets []BucketState `json:"buckets,omitempty"`
	// Lost is how many of Pending are blobs whose file this origin has lost: they come again from another origin, or
	// are found in the bucket.
	Lost int `json:"lost,omitempty"`
	// Alone is how many of Pending fewer than `replicas` origins owed, themselves included, when an origin last looked:
	// the others were down, or have lost them.
	Alone int `json:"alone,omitempty"`
	// Scanning says that an origin has not found all that it holds since its start. Pending counts one more meanwhile.
	Scanning bool `json:"scanning,omitempty"`
}

// BucketState is how one bucket answers.
type BucketState struct {
	Name  string    `json:"name"`
	State string    `json:"state"` // unknown, ready, down, missing (it does not exist), denied (it refuses the key)
	Since time.Time `json:"since"`
	Error string    `json:"error,omitempty"`
}

// NewBucketState returns the state of a bucket with the text of err, which may be nil.
func NewBucketState(name, state string, since time.Time, err error) BucketState {
	b := BucketState{Name: name, State: state, Since: since.UTC()}
	if err != nil {
		b.Error = err.Error()
	}
	return b
}

// MaxSetAside bounds the list in a WritebackStatus.
const MaxSetAside = 100

// SetAside is one change or name record that can't go on for a reason of its own.
type SetAside struct {
	Where      string        `json:"where"` // "outbox", or the id of the origin that keeps the record
	Kind       string        `json:"kind,omitempty"`
	Repository string        `json:"repository,omitempty"`
	Tag        string        `json:"tag,omitempty"`
	Digest     digest.Digest `json:"digest,omitempty"`
	Generation int64         `json:"generation,omitempty"`
	Error      string        `json:"error"`
	Since      time.Time     `json:"since"`
	Next       time.Time     `json:"next,omitzero"` // when it is tried again
}

// LayerList is a page of the members of a repository, in the order of their digests (GET layers).
type LayerList struct {
	Layers []Layer `json:"layers"`
}

// MaxLayers bounds a LayerList.
const MaxLayers = 10_000

// Layer is the membership of a blob in a repository (PUT, GET layers/<digest>).
type Layer struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
	// Copies is how many origins owe the blob that was pushed; 0, as many as there are replicas.
	Copies int `json:"copies,omitempty"`
}

// HolderRequest asks an origin to let one build-index be the only one (PUT holder).
type HolderRequest struct {
	// Holder is the build-index that asks: the same text after its restart on the same disk of a machine that runs on.
	Holder string `json:"holder"`
	// For is how long the lease holds from now on; 0 ends it.
	For time.Duration `json:"for_ns"`
	// Generation is the last that the build-index has committed. The origin keeps the highest durably.
	Generation int64 `json:"generation"`
	// KeepPaid is that the build-index has not asked for the origin's pending blobs since it started: what was paid
	// must not be forgotten.
	KeepPaid bool `json:"keep_paid,omitempty"`
}

// HolderResponse says whose lease it is.
type HolderResponse struct {
	Holder string `json:"holder"`
	// Left is how long the lease of another holds.
	Left time.Duration `json:"left_ns,omitempty"`
	// Before is who had the lease last, before who asks now; empty when the origin does not remember.
	Before string `json:"before,omitempty"`
	// Generation is the highest that any build-index has committed, as far as the origin was told.
	Generation int64 `json:"generation"`
}

// MaxHolderLease bounds how long one that does not answer any more keeps others out.
const MaxHolderLease = time.Minute
