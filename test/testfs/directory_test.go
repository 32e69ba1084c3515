package testfs

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/johannesboyne/gofakes3"
)

// Pages of any size, with any prefix, are together what is there, in the order of the keys' bytes.
func TestListPages(t *testing.T) {
	d, err := newDirectory(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := d.CreateBucket("b"); err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	keys := map[string]bool{}
	for range 300 {
		var parts []string
		for range 1 + rnd.IntN(4) {
			parts = append(parts, []string{"a", "a-b", "a.b", "ab", "b", "a_", "0"}[rnd.IntN(7)])
		}
		key := strings.Join(parts, "/") + fmt.Sprint("/f", rnd.IntN(3))
		if _, err := d.PutObject("b", key, nil, strings.NewReader("x"), 1, nil); err != nil {
			t.Fatal(err)
		}
		keys[key] = true
	}
	for _, prefix := range []string{"", "a/", "a", "a-b/a/", "none/"} {
		var want []string
		for _, k := range slices.Sorted(maps.Keys(keys)) {
			if strings.HasPrefix(k, prefix) {
				want = append(want, k)
			}
		}
		for _, n := range []int64{1, 7, 1000} {
			var got []string
			page := gofakes3.ListBucketPage{MaxKeys: n}
			for {
				l, err := d.ListBucket("b", &gofakes3.Prefix{HasPrefix: prefix != "", Prefix: prefix}, page)
				if err != nil {
					t.Fatal(err)
				}
				for _, c := range l.Contents {
					got = append(got, c.Key)
				}
				if !l.IsTruncated {
					break
				}
				page.HasMarker, page.Marker = true, l.NextMarker
			}
			if !slices.Equal(got, want) {
				t.Errorf("prefix %q in pages of %d: %d keys, want %d", prefix, n, len(got), len(want))
			}
		}
	}
}
