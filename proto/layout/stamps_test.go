package layout

import (
	"slices"
	"testing"

	"kraken/proto/cluster"
)

var stamps = []struct {
	key   string
	stamp Stamp
}{
	{"a/b/_kraken/layers/sha256/" + hex256 + "/00000000000000000007-put-12", Stamp{cluster.PutName(cluster.MembershipName("a/b", d256)).At(7), 12}},
	{"a/b/_kraken/layers/sha512/" + hex512 + "/00000000000000000007-deleted", Stamp{Change: cluster.DeleteName(cluster.MembershipName("a/b", d512)).At(7)}},
	{"a/_kraken/manifests/sha256/" + hex256 + "/01795903536000000000-put", Stamp{Change: cluster.PutName(cluster.ManifestName("a", d256)).At(1795903536000000000)}},
	{"a/_kraken/tags/v1.0_x/00000000000000000001-put-sha256-" + hex256, Stamp{Change: cluster.PutTag("a", "v1.0_x", d256).At(1)}},
	{"a/_kraken/tags/tags/00000000000000000001-deleted", Stamp{Change: cluster.DeleteName(cluster.TagName("a", "tags")).At(1)}},
}

// TestStampKeys holds the form of stamps, byte for byte: buckets that exist depend on it.
func TestStampKeys(t *testing.T) {
	for _, tc := range stamps {
		key := RepositoriesRoot + tc.key
		if got := tc.stamp.Key(); got != key {
			t.Errorf("got  %s\nwant %s", got, key)
		}
		if got, ok := ParseStamp(key); !ok || got != tc.stamp {
			t.Errorf("ParseStamp(%s) = %+v, %v", key, got, ok)
		}
		if kind, _, _, _ := ParseKey(key); kind != KindOther {
			t.Errorf("%s is taken for a link", key)
		}
	}
	if n, ok := ParseGenerationKey(GenerationKey(12)); n != 12 || !ok || GenerationKey(12) != "docker/registry/v2/kraken/generation/00000000000000000012" {
		t.Errorf("%s is read as %d, %v", GenerationKey(12), n, ok)
	}
}

// A listing has a repository's stamps first, memberships and manifests before tags, and those of one name together, the
// latest last.
func TestStampOrder(t *testing.T) {
	l, m := cluster.MembershipName("a", d256), cluster.ManifestName("a", d256)
	keys := []string{
		Stamp{cluster.PutName(l).At(1), 5}.Key(), Stamp{Change: cluster.DeleteName(l).At(20)}.Key(), Stamp{Change: cluster.PutName(m).At(3)}.Key(),
		Stamp{Change: cluster.PutTag("a", "v", d256).At(9)}.Key(), Stamp{Change: cluster.PutTag("a", "v", d256).At(10)}.Key(),
		LayerLink("a", d256), RevisionLink("a", d256), TagCurrentLink("a", "v"),
	}
	if !slices.IsSorted(keys) {
		t.Errorf("not in order: %q", keys)
	}
}

func TestStampsOfOthers(t *testing.T) {
	const dir = RepositoriesRoot + "a/_kraken/"
	for _, key := range []string{
		"", dir, dir + "tags/v", dir + "tags/v/1-deleted", dir + "tags/v/00000000000000000000-deleted", dir + "tags/v/00000000000000000001-put",
		dir + "tags/v/0000000000000000001x-deleted", dir + "tags/v/99999999999999999999-deleted", dir + "tags/v/00000000000000000001-deleted-x",
		dir + "tags/-v/00000000000000000001-deleted", dir + "layers/sha256/" + hex256 + "/00000000000000000001-put-", dir + "layers/sha256/" + hex256 + "/00000000000000000001-put--1",
		dir + "layers/sha256/" + hex256 + "/00000000000000000001-put-012", dir + "layers/md5/" + hex256 + "/00000000000000000001-deleted",
		RepositoriesRoot + "A/_kraken/tags/v/00000000000000000001-deleted", dir + "manifests/sha256/" + hex256 + "/00000000000000000001-put-x",
	} {
		if s, ok := ParseStamp(key); ok {
			t.Errorf("ParseStamp(%q) = %+v", key, s)
		}
	}
}

func FuzzParseStamp(f *testing.F) {
	for _, tc := range stamps {
		f.Add(RepositoriesRoot + tc.key)
	}
	f.Fuzz(func(t *testing.T, key string) {
		if s, ok := ParseStamp(key); ok && s.Key() != key {
			t.Errorf("ParseStamp(%q) = %+v, which is %q", key, s, s.Key())
		}
	})
}
