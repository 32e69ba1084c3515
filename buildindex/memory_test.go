package buildindex

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// A look at what origins keep has in memory what is to be adopted, once for all origins, and nothing of what SQL has:
// the outbox of a bucket that is down for days may be gigabytes.
func TestLookKeepsOnlyWhatIsAdopted(t *testing.T) {
	const manifests, size = 100, 256 << 10
	r := newRig(t)
	r.policy = []Policy{{Match: "repo", References: "lax"}}
	r.start("first.db")
	r.must(r.x.fill(t.Context()))
	for i := range manifests {
		b := layered(t, digest.FromString("{}"))
		b = []byte(strings.Replace(string(b), "{", fmt.Sprintf(`{"annotations":{"a":"%d%s"},`, i, strings.Repeat("x", size)), 1))
		_, err := r.push("repo", registry.Reference{Digest: digest.FromBytes(b)}, b, registry.PutOptions{})
		r.must(err)
	}
	for _, c := range []struct {
		what, database string
		published      bool
		most           int
	}{
		{"all is queued", "first.db", false, 0},
		{"all is in the bucket, and records were left behind", "first.db", true, 0},
		{"the database is lost", "lost.db", false, manifests},
	} {
		r.start(c.database)
		if c.published {
			r.must(r.x.db.Update(t.Context(), func(tx names.Tx) error {
				rows, err := r.x.db.Outbox(t.Context(), names.AllBuckets, 0, 10*manifests)
				for _, row := range rows {
					r.must(tx.Done(row.ID))
				}
				return err
			}))
		}
		state, err := r.x.db.State(t.Context())
		r.must(err)
		before := heap()
		rounds, errs := r.x.hearEach(t.Context(), r.x.origins.All(), state.LastGeneration)
		for _, err := range errs {
			r.must(err)
		}
		if got, most := heap()-before, (c.most+manifests/10)*size; got > most {
			t.Errorf("%s: a look keeps %d bytes, want at most %d", c.what, got, most)
		}
		runtime.KeepAlive(rounds)
	}
}

// heap returns how many bytes are in use.
func heap() int {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// Queued changes that too few origins keep are read from SQL, as many as there is room for.
func TestShortRecordsAreReadFromSQL(t *testing.T) {
	r := newRig(t)
	r.must(r.x.fill(t.Context()))
	d := r.put("v", "one")
	var kept []recordID
	for _, rec := range r.origins[0].names {
		kept = append(kept, idOf(rec))
	}
	gone := recordID{kept[0].key, kept[0].generation + 1} // published meanwhile
	r.must(r.x.addShort(t.Context(), append(kept, gone)))
	all := r.x.short.all()
	if len(all) != len(kept) {
		t.Errorf("%d records are taken up, want %d", len(all), len(kept))
	}
	for _, s := range all {
		r.origins[0].set(func() {
			was := r.origins[0].names[cluster.NameKey(s.NameRecord)]
			if was.Generation != s.Generation || string(was.Bytes) != string(s.Bytes) || string(was.Signature) != string(s.Signature) {
				t.Errorf("%s is not as an origin keeps it", s.Change())
			}
		})
		if s.Tag == "v" && digest.FromBytes(s.raw) != d {
			t.Error("the manifest's bytes are others")
		}
	}
	r.x.short = short{bytes: maxShort}
	r.must(r.x.addShort(t.Context(), kept))
	if n := len(r.x.short.all()); n != 0 {
		t.Errorf("%d records are taken up without room", n)
	}
}
