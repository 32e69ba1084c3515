package ring

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
)

func digests(n int) []digest.Digest {
	out := make([]digest.Digest, n)
	for i := range out {
		out[i] = digest.FromString(fmt.Sprint(i))
	}
	return out
}

func members(n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("origin-%02d", i+1)
	}
	return out
}

// TestGolden pins the order: it is part of the wire, and another order would look for every blob in the wrong place.
// The values were computed apart from this code, from the text of proto/README.md section 3.
func TestGolden(t *testing.T) {
	for d, want := range map[digest.Digest][]string{
		"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855":                                                                 {"origin-05", "é", "origin-01", "origin-04", "origin-02", "a b", "origin-03"},
		"sha256:686d22d695e2c21166a89498a3a3f198e8d4ad8b09190bd1d86e350a79597341":                                                                 {"origin-05", "origin-03", "origin-01", "origin-04", "origin-02", "é", "a b"},
		"sha256:dac1d7cfa95021764849fd102524e141488c5e3a90f861dbb5a12d9ac8584f85":                                                                 {"origin-01", "origin-05", "origin-04", "origin-03", "é", "origin-02", "a b"},
		"sha512:0384c3511fe28659eb5d7624919110b30852b0fb9ad9717d8b1dc51e9a53091fd40ddd7c59d4c3472828604f2656f5016f83cd20c39311d74d607602b776c45f": {"a b", "é", "origin-04", "origin-03", "origin-01", "origin-05", "origin-02"},
	} {
		if got := New([]string{"origin-01", "origin-02", "origin-03", "origin-04", "origin-05", "é", "a b"}, 2).Order(d); !slices.Equal(got, want) {
			t.Errorf("order of %s:\ngot  %v\nwant %v", d, got, want)
		}
	}
	if got := score("origin-01", "sha256:686d22d695e2c21166a89498a3a3f198e8d4ad8b09190bd1d86e350a79597341"); got != 0xbc1cce5cc5a1d421 {
		t.Errorf("score %#x", got)
	}
}

func TestMembersAreASet(t *testing.T) {
	ids := members(7)
	want := New(ids, 3)
	shuffled := append(slices.Clone(ids), ids[2], ids[5])
	rand.New(rand.NewPCG(1, 2)).Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
	given := slices.Clone(shuffled)
	got := New(shuffled, 3)
	if !slices.Equal(shuffled, given) {
		t.Error("New changed its argument")
	}
	if !slices.Equal(got.Members(), ids) {
		t.Errorf("members %v", got.Members())
	}
	for _, d := range digests(100) {
		if !slices.Equal(got.Order(d), want.Order(d)) {
			t.Fatalf("order of %s depends on the order of the configuration", d)
		}
	}
}

func TestOwners(t *testing.T) {
	for _, c := range []struct{ members, replicas, want int }{{0, 2, 0}, {1, 2, 1}, {3, 2, 2}, {3, 0, 1}, {3, -1, 1}, {2, 5, 2}} {
		r := New(members(c.members), c.replicas)
		for _, d := range digests(20) {
			owners, order := r.Owners(d), r.Order(d)
			if len(owners) != c.want || len(order) != c.members || !slices.Equal(owners, order[:len(owners)]) {
				t.Fatalf("%+v: owners %v of order %v", c, owners, order)
			}
			for i, id := range order {
				if r.Owns(id, d) != (i < c.want) {
					t.Errorf("%+v: Owns(%s) = %v", c, id, r.Owns(id, d))
				}
			}
			if r.Owns("stranger", d) {
				t.Error("a stranger owns")
			}
		}
	}
}

// TestRemoveMovesOnlyItsShare: the order without a member is the order with it, less that member, for every digest.
func TestRemoveMovesOnlyItsShare(t *testing.T) {
	ids := members(8)
	all := New(ids, 2)
	for _, gone := range ids {
		fewer := New(slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return id == gone }), 2)
		for _, d := range digests(300) {
			want := slices.DeleteFunc(all.Order(d), func(id string) bool { return id == gone })
			if got := fewer.Order(d); !slices.Equal(got, want) {
				t.Fatalf("without %s the order of %s is %v, want %v", gone, d, got, want)
			}
			if !all.Owns(gone, d) && !slices.Equal(fewer.Owners(d), all.Owners(d)) {
				t.Fatalf("%s did not own %s, and its owners changed", gone, d)
			}
		}
	}
}

// TestAddTakesItsShare: what a new member owns was taken from others only by it, and it is about replicas/n of
// everything.
func TestAddTakesItsShare(t *testing.T) {
	const n, replicas, blobs = 9, 2, 9000
	before, after := New(members(n), replicas), New(members(n+1), replicas)
	added := members(n + 1)[n]
	moved := 0
	for _, d := range digests(blobs) {
		was, is := before.Owners(d), after.Owners(d)
		if slices.Equal(was, is) {
			continue
		}
		moved++
		if !slices.Contains(is, added) {
			t.Fatalf("%s moved between old members: %v, then %v", d, was, is)
		}
		for _, id := range is {
			if id != added && !slices.Contains(was, id) {
				t.Fatalf("%s moved to %s, which was there before", d, id)
			}
		}
	}
	if want := blobs * replicas / (n + 1); moved < want*9/10 || moved > want*11/10 {
		t.Errorf("%d of %d blobs moved, want about %d", moved, blobs, want)
	}
}

func TestBalance(t *testing.T) {
	const n, blobs = 10, 10_000
	r := New(members(n), 2)
	owned := map[string]int{}
	for _, d := range digests(blobs) {
		for _, id := range r.Owners(d) {
			owned[id]++
		}
	}
	for id, got := range owned {
		if want := blobs * 2 / n; got < want*9/10 || got > want*11/10 {
			t.Errorf("%s owns %d, want about %d", id, got, want)
		}
	}
	if len(owned) != n {
		t.Errorf("%d members own something, want %d", len(owned), n)
	}
}
