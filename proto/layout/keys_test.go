package layout

import (
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

const (
	hex256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
	d256   = digest.Digest("sha256:" + hex256)
)

var (
	hex512 = strings.Repeat("9b", 64)
	d512   = digest.Digest("sha512:" + hex512)
)

// TestOCIPaths holds the layout of distribution's registry, byte for byte: buckets that exist depend on it.
func TestOCIPaths(t *testing.T) {
	const v2 = "docker/registry/v2/"
	for _, tc := range []struct {
		got, want string
		kind      Kind
		repo, tag string
		d         digest.Digest
	}{
		{BlobKey(d256), v2 + "blobs/sha256/2c/" + hex256 + "/data", KindOther, "", "", ""},
		{BlobKey(d512), v2 + "blobs/sha512/9b/" + hex512 + "/data", KindOther, "", "", ""},
		{MetainfoKey(d256), v2 + "blobs/sha256/2c/" + hex256 + "/metainfo", KindOther, "", "", ""},
		{MediaTypeKey(d256), v2 + "blobs/sha256/2c/" + hex256 + "/mediatype", KindOther, "", "", ""},
		{RevisionLink("a/b", d256), v2 + "repositories/a/b/_manifests/revisions/sha256/" + hex256 + "/link", KindRevision, "a/b", "", d256},
		{RevisionLink("a", d512), v2 + "repositories/a/_manifests/revisions/sha512/" + hex512 + "/link", KindRevision, "a", "", d512},
		{LayerLink("a.b/c__d", d256), v2 + "repositories/a.b/c__d/_layers/sha256/" + hex256 + "/link", KindLayer, "a.b/c__d", "", d256},
		{TagCurrentLink("a/b", "v1.0_x"), v2 + "repositories/a/b/_manifests/tags/v1.0_x/current/link", KindTagCurrent, "a/b", "v1.0_x", ""},
		{TagRecordKey("a/b", "_"), v2 + "repositories/a/b/_manifests/tags/_/current/kraken", KindTagRecord, "a/b", "_", ""},
		{TagIndexLink("a/b", "v1", d256), v2 + "repositories/a/b/_manifests/tags/v1/index/sha256/" + hex256 + "/link", KindOther, "", "", ""},
		// Repositories may be named like parts of the layout.
		{LayerLink("tags/current/link", d256), v2 + "repositories/tags/current/link/_layers/sha256/" + hex256 + "/link", KindLayer, "tags/current/link", "", d256},
		{TagCurrentLink("a", "current"), v2 + "repositories/a/_manifests/tags/current/current/link", KindTagCurrent, "a", "current", ""},
	} {
		if tc.got != tc.want {
			t.Errorf("got  %s\nwant %s", tc.got, tc.want)
		}
		kind, repo, tag, d := ParseKey(tc.want)
		if kind != tc.kind || repo != tc.repo || tag != tc.tag || d != tc.d {
			t.Errorf("ParseKey(%s) = %v, %q, %q, %q, want %v, %q, %q, %q", tc.want, kind, repo, tag, d, tc.kind, tc.repo, tc.tag, tc.d)
		}
	}
}

func TestOCIPathsOfOthers(t *testing.T) {
	const repos = "docker/registry/v2/repositories/"
	for _, key := range []string{
		"", "docker/registry/v2/", repos, repos + "a", "elsewhere/a/_layers/sha256/" + hex256 + "/link",
		repos + "a/_layers/sha256/" + hex256, repos + "a/_layers/sha256/" + hex256[1:] + "/link", repos + "a/_layers/md5/" + hex256 + "/link",
		repos + "a/_manifests/revisions/sha256/" + hex256 + "/other", repos + "a/_manifests/tags/v1/current", repos + "a/_manifests/tags/v1/x/current/link",
		repos + "a/_uploads/0b6bd1e8/startedat",
		// Not even by hand can a bucket hold names that no client could ask for.
		repos + "/_layers/sha256/" + hex256 + "/link", repos + "A/_layers/sha256/" + hex256 + "/link", repos + "a/../b/_manifests/revisions/sha256/" + hex256 + "/link",
		repos + "a/_manifests/tags/-v1/current/link", repos + "a/_manifests/tags//current/link", repos + "a//b/_manifests/tags/v1/current/link",
	} {
		if kind, repo, tag, d := ParseKey(key); kind != KindOther || repo != "" || tag != "" || d != "" {
			t.Errorf("ParseKey(%q) = %v, %q, %q, %q, want nothing", key, kind, repo, tag, d)
		}
	}
}

func FuzzParseKey(f *testing.F) {
	for _, s := range []string{LayerLink("a/b", d256), RevisionLink("a", d512), TagCurrentLink("a", "v1"), TagRecordKey("a/b", "x"), RepositoriesRoot + "a/../b/_layers/"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, key string) {
		kind, repo, tag, d := ParseKey(key)
		var back string
		switch kind {
		case KindLayer:
			back = LayerLink(repo, d)
		case KindRevision:
			back = RevisionLink(repo, d)
		case KindTagCurrent:
			back = TagCurrentLink(repo, tag)
		case KindTagRecord:
			back = TagRecordKey(repo, tag)
		default:
			return
		}
		if back != key {
			t.Errorf("ParseKey(%q) = %v, %q, %q, %q, which is %q", key, kind, repo, tag, d, back)
		}
	})
}
