package cluster

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
	"kraken/proto/registry"
)

// Kinds of records on the wire. Only this file knows them: elsewhere a record is its Change.
const (
	kindManifest = "manifest" // a manifest was put, by a tag or without one
	kindLayer    = "layer"    // a blob was made a member of a repository
	kindDeleted  = "deleted"  // a tombstone: of a tag, a manifest, or with media type "layer" of a membership
	kindRefused  = "refused"  // no change: the record of this generation whose key the digest has is to be believed by nobody
)

// Versions of name records.
const (
	NameWhole = 1 // a manifest's record has the manifest's bytes
	// a tag's record names a manifest whose bytes are in another record of the same digest, in SQL or in the bucket
	NameRef = 2
)

// MaxGenerationSkew is how far ahead of the reader's clock a record's generation and time may be. It bounds how far
// anything from outside can drive the counter of generations.
const MaxGenerationSkew = time.Hour

// NameRecord is the durable copy of one change of names that is not in the bucket yet. Origins keep records and give
// them back; build-index writes and removes them. Of two records for one (Repository, Tag or Digest) the one with the
// higher Generation wins.
type NameRecord struct {
	Version    int           `json:"version"` // NameWhole or NameRef
	Kind       string        `json:"kind"`    // see Change
	Repository string        `json:"repository"`
	Tag        string        `json:"tag,omitempty"`
	Digest     digest.Digest `json:"digest"`
	MediaType  string        `json:"media_type,omitempty"`
	Size       int64         `json:"size"`
	Bytes      []byte        `json:"bytes,omitempty"`
	Generation int64         `json:"generation"` // microseconds since 1970, or one more than the last
	Time       time.Time     `json:"time"`
	// Signature is build-index's, over all fields above (NameSigner).
	Signature []byte `json:"signature,omitempty"`
}

// NewRecord returns the record of a change made at a time, of version 1 and not signed. That of a tag or a manifest
// that was put gets its media type, size and bytes from the caller, and that of a membership its size.
func NewRecord(c Change, now time.Time) NameRecord {
	r := NameRecord{Version: NameWhole, Repository: c.Repository, Tag: c.Tag, Digest: c.Digest, Generation: c.Generation, Time: now.UTC()}
	switch {
	case c.Act == Delete:
		r.Kind = kindDeleted
		if c.Kind == Membership {
			r.MediaType = kindLayer // of two things with this digest, the membership is meant
		}
	case c.Kind == Membership:
		r.Kind = kindLayer
	default:
		r.Kind = kindManifest
		if c.Kind == Tag {
			r.Digest = c.Target
		}
	}
	return r
}

// NewRefusal returns the record that the change of another record was refused, of which an origin that can't be reached
// may have a copy. It is not signed.
func NewRefusal(repo, key string, generation int64, now time.Time) NameRecord {
	return NameRecord{
		Version: NameWhole, Kind: kindRefused, Repository: repo, Digest: digest.NewDigestFromEncoded(digest.SHA256, key),
		Generation: generation, Time: now.UTC(),
	}
}

// Refuses returns the key of the record that r, a record that holds, says was refused, at r's generation. ok is false
// where r is a change.
func (r NameRecord) Refuses() (key string, ok bool) {
	if r.Kind != kindRefused {
		return "", false
	}
	return r.Digest.Encoded(), true
}

// Change returns the change that r is the record of, of a name of no kind where r is a refusal or of a kind that is not
// known. A manifest that was put by a tag is a change of the tag; Changes has that of the manifest as well.
func (r NameRecord) Change() Change {
	var c Change
	switch {
	case r.Kind == kindDeleted && r.Tag != "":
		c = DeleteName(TagName(r.Repository, r.Tag))
	case r.Kind == kindDeleted && r.MediaType == kindLayer:
		c = DeleteName(MembershipName(r.Repository, r.Digest))
	case r.Kind == kindDeleted:
		c = DeleteName(ManifestName(r.Repository, r.Digest))
	case r.Kind == kindLayer:
		c = PutName(MembershipName(r.Repository, r.Digest))
	case r.Kind == kindManifest && r.Tag != "":
		c = PutTag(r.Repository, r.Tag, r.Digest)
	case r.Kind == kindManifest:
		c = PutName(ManifestName(r.Repository, r.Digest))
	}
	return c.At(r.Generation)
}

// Changes returns every change that r is the record of: a push by tag puts the tag and the manifest.
func (r NameRecord) Changes() []Change {
	c := r.Change()
	if c.Act == Put && c.Kind == Tag {
		return []Change{c, PutName(ManifestName(r.Repository, r.Digest)).At(r.Generation)}
	}
	return []Change{c}
}

// NameDeletion makes an origin forget the record of a key, if it is of this generation or an older one.
type NameDeletion struct {
	Repository string
	Key        string
	Generation int64
	Signature  []byte
}

// NameKey returns the key under which origins keep a record, hex SHA-256. A record is replaced only by one of the same
// kind, repository, tag and digest: a tag that was moved twice leaves two records, so that neither manifest is lost.
func NameKey(r NameRecord) string {
	kind := r.Kind
	if kind == kindDeleted && r.MediaType == kindLayer {
		kind += " " + kindLayer // of two things with this digest, the membership is meant
	}
	if kind == kindRefused { // each is for itself
		kind += fmt.Sprintf(" %d", r.Generation)
	}
	sum := sha256.Sum256([]byte(strings.Join([]string{kind, r.Repository, r.Tag, r.Digest.String()}, "\x00")))
	return hex.EncodeToString(sum[:])
}

// mediaTypeGrammar is that of RFC 6838 section 4.2.
var mediaTypeGrammar = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}$`)

// ParseNameRecord returns the record in the JSON b, which comes from outside, after checking it:
// registry.ErrRecordInvalid for one that does not hold at the time now, registry.ErrDenied for one that none of keys
// signed. What it returns beside an error is what could be read, to name the record by and for nothing else.
func ParseNameRecord(b []byte, keys NameKeys, now time.Time) (NameRecord, error) {
	var r NameRecord
	if len(b) > MaxNameRecord {
		return r, fmt.Errorf("%w: it has %d bytes, at most %d", registry.ErrRecordInvalid, len(b), MaxNameRecord)
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("%w: %w", registry.ErrRecordInvalid, err)
	}
	if err := r.Check(now); err != nil {
		return r, err
	}
	return r, keys.Verify(r)
}

// Check returns registry.ErrRecordInvalid with what of the record can't be, as far as the record alone tells. It does
// not look at the signature.
func (r NameRecord) Check(now time.Time) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %w", registry.ErrRecordInvalid, fmt.Errorf(format, args...))
	}
	if r.Version != NameWhole && r.Version != NameRef {
		return bad("version %d, this program knows %d and %d", r.Version, NameWhole, NameRef)
	}
	if err := registry.CheckName(r.Repository); err != nil {
		return bad("repository: %w", err)
	}
	if r.Tag != "" {
		if err := registry.CheckTag(r.Tag); err != nil {
			return bad("tag: %w", err)
		}
	}
	if _, err := blob.ParseDigest(r.Digest.String()); err != nil && (r.Digest != "" || r.Kind != kindDeleted) {
		return bad("digest: %w", err)
	}
	latest := now.Add(MaxGenerationSkew)
	if r.Generation < 1 || r.Generation > latest.UnixMicro() {
		return bad("generation %d: want 1 to %d, which is %s from now", r.Generation, latest.UnixMicro(), MaxGenerationSkew)
	}
	if r.Time.After(latest) {
		return bad("time %s is more than %s from now", r.Time.Format(time.RFC3339), MaxGenerationSkew)
	}
	if err := r.checkKind(); err != nil {
		return bad("%w", err)
	}
	return nil
}

// checkKind returns an error for fields that don't fit the record's kind.
func (r NameRecord) checkKind() error {
	if r.Size < 0 || r.Kind != kindManifest && len(r.Bytes) > 0 {
		return fmt.Errorf("%s record with size %d and %d bytes", r.Kind, r.Size, len(r.Bytes))
	}
	switch r.Kind {
	case kindManifest:
		if !mediaTypeGrammar.MatchString(r.MediaType) {
			return fmt.Errorf("media type %.200q", r.MediaType)
		}
		if r.Version == NameRef && r.Tag != "" && len(r.Bytes) == 0 && r.Size <= registry.MaxManifest {
			return nil
		}
		if int64(len(r.Bytes)) != r.Size || len(r.Bytes) > registry.MaxManifest {
			return fmt.Errorf("size is %d, at most %d, and there are %d bytes", r.Size, registry.MaxManifest, len(r.Bytes))
		}
		if got := r.Digest.Algorithm().FromBytes(r.Bytes); got != r.Digest {
			return fmt.Errorf("the bytes are %s, not %s", got, r.Digest)
		}
		return nil
	case kindLayer:
		if r.Tag != "" || r.MediaType != "" {
			return fmt.Errorf("a membership has neither a tag (%q) nor a media type (%.200q)", r.Tag, r.MediaType)
		}
		return nil
	case kindDeleted:
		if (r.Tag == "") == (r.Digest == "") {
			return fmt.Errorf("want a tag or a digest that was deleted, got %q and %q", r.Tag, r.Digest)
		}
		if r.MediaType != "" && (r.MediaType != kindLayer || r.Digest == "") {
			return fmt.Errorf("media type %.200q of what was deleted", r.MediaType)
		}
		return nil
	case kindRefused:
		if r.Tag != "" || r.MediaType != "" || r.Size != 0 || r.Digest.Algorithm() != digest.SHA256 {
			return fmt.Errorf("a refusal has the key of a record, got tag %q, digest %s, media type %.200q and size %d", r.Tag, r.Digest, r.MediaType, r.Size)
		}
		return nil
	}
	return fmt.Errorf("kind %.50q is none that is known", r.Kind)
}
