package buildindex

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/registry"
)

// plant puts a record on both origins past every check, as one who has their disks can.
func (r *rig) plant(rec cluster.NameRecord) {
	for _, o := range r.origins {
		o.set(func() { o.names[cluster.NameKey(rec)] = rec })
	}
}

// forged is a record that moves a tag of repo to these bytes.
func forged(tag string, raw []byte, generation int64) cluster.NameRecord {
	return cluster.NameRecord{
		Version: 1, Kind: "manifest", Repository: "repo", Tag: tag, Digest: digest.FromBytes(raw), Size: int64(len(raw)), Bytes: raw,
		MediaType: "application/vnd.oci.image.manifest.v1+json", Generation: generation, Time: time.Now().Add(-time.Hour),
	}
}

func (r *rig) wantAside(n int) {
	r.Helper()
	s, err := r.x.status(r.Context())
	r.must(err)
	if s.SetAsideCount != n || len(s.SetAside) != n {
		r.Errorf("/writeback shows %d set aside: %+v; want %d", s.SetAsideCount, s.SetAside, n)
	}
	if err := r.x.aside.check(r.Context()); (err != nil) != (n > 0) {
		r.Errorf("readiness says %v", err)
	}
}

// Records that somebody else wrote stop neither the restoration nor the pushes after it, and change no name, with
// signatures and without.
func TestForgedRecordsChangeNothing(t *testing.T) {
	other := raw("", "a/forged")
	now := time.Now().UnixMicro()
	wrong := forged("x", other, now)
	wrong.Digest = digest.FromString("other bytes")
	for name, rec := range map[string]cluster.NameRecord{
		"a generation near the last there is": forged("v1", other, math.MaxInt64-1),
		"a generation that makes it wrap":     forged("x", other, math.MaxInt64-6),
		"a generation of tomorrow":            forged("x", other, now+24*3600e6),
		"bytes that are no manifest":          forged("x", []byte("hello"), now),
		"bytes of another digest":             wrong,
		"a path for a repository":             {Version: 1, Kind: "layer", Repository: "../x", Digest: digest.FromString("x"), Generation: now},
		"a kind that is not known":            {Version: 1, Kind: "x", Repository: "repo", Digest: digest.FromString("x"), Generation: now},
		"a version that is not known":         {Version: 9, Kind: "layer", Repository: "repo", Digest: digest.FromString("x"), Generation: now},
		"an immutable tag that moves":         forged("v1", other, now+1e6),
		"an immutable tag that is deleted":    {Version: 1, Kind: "deleted", Repository: "repo", Tag: "v1", Generation: now + 1e6},
		"a manifest in no record and nowhere": {Version: 2, Kind: "manifest", Repository: "repo", Tag: "x", Digest: digest.FromString("x"), Size: 1, MediaType: "a/b", Generation: now},
	} {
		for _, how := range []string{"signed", "not signed, no keys"} {
			t.Run(name+", "+how, func(t *testing.T) {
				r := newRig(t)
				r.policy = []Policy{{Match: "repo", ImmutableTags: "v.*"}}
				if how != "signed" {
					r.keyFile = ""
				}
				r.start("first.db")
				r.must(r.x.fill(t.Context()))
				a := r.put("v1", "one")
				if strings.HasPrefix(name, "an immutable tag") {
					rec.Generation = time.Now().Add(time.Minute).UnixMicro() // newer than the push
				}
				r.plant(r.x.signer.Sign(rec)) // even signed
				r.lose()
				r.wantTag("v1", a)
				r.wantTag("x", "")
				r.wantAside(2) // at two origins
				if rec.Repository == "repo" && r.x.generation.Load() > time.Now().Add(cluster.MaxGenerationSkew).UnixMicro() {
					t.Error("the counter was driven ahead")
				}
				b := r.put("latest", "two")
				r.wantTag("latest", b)
				r.must(r.x.reconcile(t.Context(), r.x.origins.All()))
				r.wantTag("v1", a)
				r.wantAside(2) // and not taken back, although the counter has gone past it
				r.start("second.db")
				r.wantAside(2) // also after a restart
			})
		}
	}
}

// A record that nobody signed is set aside where keys are configured; one of a change that is still queued is signed.
func TestUnsignedRecords(t *testing.T) {
	r := newRig(t)
	key := r.keyFile
	r.keyFile = ""
	r.start("first.db")
	r.must(r.x.fill(t.Context()))
	a := r.put("v", "one")
	r.keyFile = key
	r.start("first.db")
	r.plant(forged("x", raw("", "a/a"), time.Now().UnixMicro()))
	r.must(r.x.reconcile(t.Context(), r.x.origins.All()))
	r.wantTag("x", "")
	r.wantAside(2)
	r.lose()
	r.wantTag("v", a)
	r.wantTag("x", "")
	r.wantAside(2)
}

// A counter that can't go up is an error: no push is answered as if it had changed something.
func TestCounterAheadOfTheClock(t *testing.T) {
	r := newRig(t)
	r.must(r.x.fill(t.Context()))
	for _, at := range []int64{math.MaxInt64, math.MaxInt64 - 7, time.Now().Add(2 * cluster.MaxGenerationSkew).UnixMicro()} {
		r.x.generation.Store(at)
		_, err := r.push("repo", registry.Reference{Tag: "v"}, layered(t, digest.FromString("{}")), registry.PutOptions{})
		if err == nil {
			t.Fatalf("at %d a push is accepted", at)
		}
		if _, err := r.x.nextGeneration(); !errors.Is(err, registry.ErrUnavailable) || !errors.Is(err, errClock) {
			t.Errorf("at %d: %v", at, err)
		}
	}
}

// pushTags pushes one manifest with n tags.
func (r *rig) pushTags(n int, size int) digest.Digest {
	r.Helper()
	r.policy = []Policy{{Match: "repo", References: "lax"}}
	r.start("first.db")
	b := layered(r.TB, digest.FromString("{}"))
	b = []byte(strings.Replace(string(b), "{", `{"annotations":{"a":"`+strings.Repeat("x", size)+`"},`, 1))
	var o registry.PutOptions
	for i := range n {
		o.Tags = append(o.Tags, fmt.Sprintf("t%d", i))
	}
	d := digest.FromBytes(b)
	_, err := r.push("repo", registry.Reference{Digest: d}, b, o)
	r.must(err)
	return d
}

// The bytes of a manifest are kept once, however many tags are pushed with it.
func TestManyTagsKeepBytesOnce(t *testing.T) {
	const size, tags = 3 << 20, 100
	r := newRig(t)
	d := r.pushTags(tags, size)
	kept := 0
	for _, o := range r.origins {
		for _, rec := range o.names {
			b, err := json.Marshal(rec)
			r.must(err)
			kept += len(b)
		}
	}
	rows, err := r.x.db.Outbox(t.Context(), names.AllBuckets, 0, 2*tags)
	r.must(err)
	for _, row := range rows {
		kept += len(row.Record.Bytes)
	}
	if most := 2*size*4/3 + 1<<20; kept > most {
		t.Errorf("records of %d tags have %d bytes, want at most %d", tags, kept, most)
	}
	r.lose()
	for _, tag := range []string{"t0", "t1", "t99"} {
		r.wantTag(tag, d)
	}
	if m, err := r.x.db.Manifest(t.Context(), "repo", registry.Reference{Tag: "t57"}); err != nil || digest.FromBytes(m.Bytes) != d {
		t.Errorf("manifest of t57: %v", err)
	}
	r.wantAside(0)
}

// A tag whose manifest's record is gone already is restored with the bucket's bytes; one whose bytes are nowhere now is
// when they are back.
func TestTagRecordFindsBytesInTheBucket(t *testing.T) {
	r := newRig(t)
	d := r.pushTags(2, 10)
	m, err := r.x.db.Manifest(t.Context(), "repo", registry.Reference{Digest: d})
	r.must(err)
	for _, o := range r.origins {
		o.set(func() {
			maps.DeleteFunc(o.names, func(_ string, rec cluster.NameRecord) bool { return len(rec.Bytes) > 0 })
		})
	}
	r.lose()
	r.wantTag("t1", "")
	r.wantAside(2)
	r.put("later", "raises the counter")
	_, b, _ := r.x.buckets.For("repo")
	r.must(b.Put(t.Context(), layout.BlobKey(d), strings.NewReader(string(m.Bytes))))
	r.must(r.x.reconcile(t.Context(), r.x.origins.All()))
	r.wantTag("t1", d)
	r.wantAside(0)
}

// Readiness and metrics are asked for while a build-index that waited for the one before it opens the database.
func TestAsideIsListedWhileItIsLoaded(t *testing.T) {
	r := newRig(t)
	var a aside
	var wg sync.WaitGroup
	wg.Go(func() { a.list(1) })
	r.must(a.load(t.Context(), r.x.db))
	wg.Wait()
}
