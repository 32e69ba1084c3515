// Package layout is where things are in a bucket, for all who write to it or read from it. The keys are those that
// registries already use (distribution's storage, version 2), so that an existing bucket stays readable and ours can be
// served by others; what Kraken adds lies beside them under names that others ignore. It opens no bucket: that is
// origin/bucket.
package layout

import (
	"bytes"
	"path"
	"strings"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
	"kraken/proto/registry"
)

// The layout of distribution's registry, version 2.
const (
	root             = "docker/registry/v2"
	RepositoriesRoot = root + "/repositories/"
)

// ProbeKey is a key that nobody writes. To ask for it tells whether the bucket answers.
const ProbeKey = root + "/ready"

// Link is the content of every link: the digest that it leads to.
func Link(d digest.Digest) []byte { return []byte(d.String()) }

// ParseLink is the inverse of Link. Links that others wrote may end with a line break.
func ParseLink(b []byte) (digest.Digest, error) { return blob.ParseDigest(string(bytes.TrimSpace(b))) }

func blobDir(d digest.Digest) string {
	h := d.Encoded()
	return path.Join(root, "blobs", d.Algorithm().String(), h[:2], h)
}

// BlobKey is a blob's bytes.
func BlobKey(d digest.Digest) string { return blobDir(d) + "/data" }

// MetainfoKey is a blob's metainfo, beside its bytes.
func MetainfoKey(d digest.Digest) string { return blobDir(d) + "/metainfo" }

// MediaTypeKey is the media type of a manifest whose bytes don't tell it.
func MediaTypeKey(d digest.Digest) string { return blobDir(d) + "/mediatype" }

func repoDir(repo string) string { return RepositoriesRoot + repo }

func linkTo(dir string, d digest.Digest) string {
	return path.Join(dir, d.Algorithm().String(), d.Encoded(), "link")
}

// RevisionLink says that a repository has a manifest.
func RevisionLink(repo string, d digest.Digest) string {
	return linkTo(repoDir(repo)+"/_manifests/revisions", d)
}

// LayerLink says that a blob is a member of a repository.
func LayerLink(repo string, d digest.Digest) string { return linkTo(repoDir(repo)+"/_layers", d) }

func tagDir(repo, tag string) string { return repoDir(repo) + "/_manifests/tags/" + tag }

// TagCurrentLink holds the digest that a tag has.
func TagCurrentLink(repo, tag string) string { return tagDir(repo, tag) + "/current/link" }

// TagRecordKey is the tag's record with its generation; distribution ignores it.
func TagRecordKey(repo, tag string) string { return tagDir(repo, tag) + "/current/kraken" }

// TagIndexLink says that a tag has had a digest.
func TagIndexLink(repo, tag string, d digest.Digest) string {
	return linkTo(tagDir(repo, tag)+"/index", d)
}

// Kind is what a key below RepositoriesRoot is.
type Kind int

// Kinds of keys.
const (
	KindOther Kind = iota
	KindRevision
	KindLayer
	KindTagCurrent
	KindTagRecord
)

// ParseKey is the inverse of the functions above, for restoring names from a bucket. What no client could have pushed
// is KindOther.
func ParseKey(key string) (kind Kind, repo, tag string, d digest.Digest) {
	rest, ok := strings.CutPrefix(key, RepositoriesRoot)
	if !ok {
		return KindOther, "", "", ""
	}
	if repo, link, ok := strings.Cut(rest, "/_layers/"); ok {
		if d, ok := parseLink(link); ok && registry.CheckName(repo) == nil {
			return KindLayer, repo, "", d
		}
		return KindOther, "", "", ""
	}
	repo, rest, ok = strings.Cut(rest, "/_manifests/")
	if !ok || registry.CheckName(repo) != nil {
		return KindOther, "", "", ""
	}
	if link, ok := strings.CutPrefix(rest, "revisions/"); ok {
		if d, ok := parseLink(link); ok {
			return KindRevision, repo, "", d
		}
		return KindOther, "", "", ""
	}
	if rest, ok := strings.CutPrefix(rest, "tags/"); ok {
		if tag, ok := strings.CutSuffix(rest, "/current/link"); ok && isTag(tag) {
			return KindTagCurrent, repo, tag, ""
		}
		if tag, ok := strings.CutSuffix(rest, "/current/kraken"); ok && isTag(tag) {
			return KindTagRecord, repo, tag, ""
		}
	}
	return KindOther, "", "", ""
}

func isTag(s string) bool {
	ref, err := registry.ParseReference(s)
	return err == nil && ref.Tag == s
}

// parseLink reads <algorithm>/<hex>/link.
func parseLink(s string) (digest.Digest, bool) {
	p := strings.Split(s, "/")
	if len(p) != 3 || p[2] != "link" {
		return "", false
	}
	d, err := blob.ParseDigest(p[0] + ":" + p[1])
	return d, err == nil
}
