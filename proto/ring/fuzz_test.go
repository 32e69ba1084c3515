package ring

import (
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

// FuzzOrder has every set of ids ordered completely, the same whatever order they are configured in; and who leaves
// moves nobody else.
func FuzzOrder(f *testing.F) {
	f.Add("origin-01,origin-02,origin-03", "sha256:00", 2)
	f.Add(",,a,a", "", -1)
	f.Fuzz(func(t *testing.T, list, d string, replicas int) {
		ids := strings.Split(list, ",")
		if len(ids) > 100 {
			return
		}
		r := New(ids, replicas)
		order := r.Order(digest.Digest(d))
		sorted := slices.Sorted(slices.Values(order))
		if !slices.Equal(sorted, r.Members()) || len(slices.Compact(sorted)) != len(order) {
			t.Fatalf("%q is ordered %q", list, order)
		}
		if owners := r.Owners(digest.Digest(d)); len(owners) != min(max(replicas, 1), len(order)) || !slices.Equal(owners, order[:len(owners)]) {
			t.Fatalf("%q, %d replicas: owners %q of %q", list, replicas, owners, order)
		}
		slices.Reverse(ids)
		if other := New(ids, replicas).Order(digest.Digest(d)); !slices.Equal(other, order) {
			t.Fatalf("%q is ordered %q, the other way round %q", list, order, other)
		}
		if fewer := New(order[1:], replicas).Order(digest.Digest(d)); !slices.Equal(fewer, order[1:]) {
			t.Fatalf("without %q %q is ordered %q", order[0], order, fewer)
		}
	})
}
