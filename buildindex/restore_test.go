package buildindex

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/buildindex/names"
	"kraken/origin/bucket"
	"kraken/origin/upstream"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/ring"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// fakeOrigin keeps name records as an origin does, and says which blobs are in the bucket.
type fakeOrigin struct {
	*httptest.Server
	mu      sync.Mutex
	down    bool
	names   map[string]cluster.NameRecord
	pending []cluster.PendingBlob
	durable bool
	holder  holder
	onPut   func()                                            // unless nil, called when a record was written
	first   func(w http.ResponseWriter, r *http.Request) bool // unless nil, called before anything else; true has answered
}

// holder is a lease as an origin gives it.
type holder struct {
	id         string
	until      time.Time
	generation int64
}

func (h *holder) ask(q cluster.HolderRequest) cluster.HolderResponse {
	if h.id != "" && h.id != q.Holder && time.Now().Before(h.until) {
		return cluster.HolderResponse{Holder: h.id, Left: time.Until(h.until)}
	}
	before := h.id
	h.id, h.until, h.generation = q.Holder, time.Now().Add(q.For), max(h.generation, q.Generation)
	return cluster.HolderResponse{Holder: h.id, Before: before, Generation: h.generation}
}

func newFakeOrigin(t testing.TB) *fakeOrigin {
	f := &fakeOrigin{names: map[string]cluster.NameRecord{}}
	f.Server = httptest.NewServer(f)
	t.Cleanup(f.Close)
	return f
}

func (f *fakeOrigin) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fakeOrigin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	first := f.first
	f.mu.Unlock()
	if first != nil && first(w, r) {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.down {
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	parts := strings.Split(r.URL.Path, "/")
	key := parts[len(parts)-1]
	if asks := r.URL.Query().Get("holder"); asks != "" && f.holder.id != "" && f.holder.id != asks && time.Now().Before(f.holder.until) { // as an origin does
		registry.WriteError(w, r, registry.ErrHeld)
		return
	}
	enc := json.NewEncoder(w)
	switch {
	case r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/names"), r.Method == http.MethodGet && key == "" && parts[len(parts)-2] == "names":
		for _, rec := range f.names {
			enc.Encode(rec)
		}
	case r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/pending"):
		for _, p := range f.pending {
			enc.Encode(p)
		}
	case r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/holder"):
		var q cluster.HolderRequest
		json.NewDecoder(r.Body).Decode(&q)
		enc.Encode(f.holder.ask(q))
	case r.Method == http.MethodPut:
		var rec cluster.NameRecord
		if err := json.NewDecoder(r.Body).Decode(&rec); err != nil || cluster.NameKey(rec) != key {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		if f.names[key].Generation <= rec.Generation {
			f.names[key] = rec
		}
		if f.onPut != nil {
			f.onPut()
		}
		w.WriteHeader(http.StatusCreated)
	case r.Method == http.MethodDelete:
		gen, _ := strconv.ParseInt(r.URL.Query().Get("generation"), 10, 64)
		if f.names[key].Generation <= gen {
			delete(f.names, key)
		}
		w.WriteHeader(http.StatusAccepted)
	case r.Method == http.MethodPost:
		var q cluster.DurableRequest
		json.NewDecoder(r.Body).Decode(&q)
		if len(q.Digests) > cluster.MaxDurableDigests { // as an origin does
			registry.WriteError(w, r, errBody)
			return
		}
		var a cluster.DurableResponse
		if f.durable {
			a.Durable = q.Digests
		} else {
			a.Pending = q.Digests
		}
		enc.Encode(a)
	}
}

func (f *fakeOrigin) kept() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.names)
}

// rig is a build-index over two fake origins and a bucket in a folder; its parts are run by hand.
type rig struct {
	testing.TB
	dir      string
	origins  []*fakeOrigin
	keyFile  string // not lost with the database
	policy   []Policy
	replicas int
	short    bool        // changes are kept by one origin, and by no bucket
	two      bool        // a second bucket, for repositories below other
	buckets  *bucket.Set // unless nil, instead of the one in the folder
	wrap     func(bucket.Bucket) bucket.Bucket

	upstreams upstream.Config
	x         *Index
}

func newRig(t testing.TB) *rig {
	r := &rig{TB: t, dir: t.TempDir(), origins: []*fakeOrigin{newFakeOrigin(t), newFakeOrigin(t)}}
	r.keyFile = filepath.Join(r.dir, "record.key")
	r.start("first.db")
	return r
}

// start opens a build-index on this database; another name is a lost disk.
func (r *rig) start(database string) {
	r.Helper()
	if r.x != nil {
		r.stop()
	}
	x, err := New(r.config(database), role.Deps{Log: slog.New(slog.DiscardHandler), Registry: prometheus.NewRegistry()})
	if err != nil {
		r.Fatal(err)
	}
	r.x = x
	x.keptWait = time.Millisecond
	if r.wrap != nil {
		r.through(r.wrap)
	}
	if r.buckets != nil {
		x.buckets = r.buckets
	}
	r.Cleanup(r.stop)
}

func (r *rig) config(database string) Config {
	cfg := Config{
		Config: role.Config{Server: transport.ServerConfig{Listen: "127.0.0.1:0"}, Replicas: r.replicas}, Database: filepath.Join(r.dir, database),
		RecordKeyFile: r.keyFile, Repositories: r.policy, Upstreams: r.upstreams,
		Buckets: []bucket.Config{{Name: "b", URL: "file://" + filepath.Join(r.dir, "bucket")}},
	}
	if r.two {
		other := bucket.Config{Name: "other", URL: "file://" + filepath.Join(r.dir, "other"), Repositories: "other/.*"}
		cfg.Buckets = []bucket.Config{other, cfg.Buckets[0]}
	}
	for i, o := range r.origins {
		cfg.Origins = append(cfg.Origins, ring.Member{ID: fmt.Sprintf("origin-%02d", i+1), URL: o.URL})
	}
	return cfg
}

// through puts something around the bucket.
func (r *rig) through(f func(bucket.Bucket) bucket.Bucket) {
	r.x.buckets = r.x.buckets.Wrap(func(_ string, b bucket.Bucket) bucket.Bucket { return f(b) })
}

func (r *rig) stop() {
	if r.x != nil {
		if err := r.x.Close(); err != nil {
			r.Error(err)
		}
		r.x = nil
	}
}

func (r *rig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

// mustKeep fails where a change was not acknowledged, or was although only one origin keeps it.
func (r *rig) mustKeep(err error) {
	r.Helper()
	if !r.short {
		r.must(err)
	} else if !errors.Is(err, registry.ErrTooFewCopies) {
		r.Fatalf("a change that one origin keeps: %v, want %v", err, registry.ErrTooFewCopies)
	}
}

// put pushes a manifest of one layer, which text tells apart.
func (r *rig) put(tag, text string) digest.Digest {
	r.Helper()
	layer := digest.FromString(text)
	r.mustKeep(r.x.putLayer(r.Context(), "repo", cluster.Layer{Digest: layer, Size: int64(len(text)), Copies: 2 - len(r.down())}))
	desc := v1.Descriptor{MediaType: "application/octet-stream", Digest: layer, Size: int64(len(text))}
	raw, err := json.Marshal(v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: desc, Layers: []v1.Descriptor{desc}})
	r.must(err)
	raw = []byte(strings.Replace(string(raw), "{", `{"schemaVersion":2,`, 1))
	raw = []byte(strings.Replace(string(raw), `"schemaVersion":0,`, "", 1))
	ref := registry.Reference{Tag: tag}
	if tag == "" {
		ref = registry.Reference{Digest: digest.FromBytes(raw)}
	}
	_, err = r.x.PutManifest(r.Context(), "repo", ref, v1.MediaTypeImageManifest, raw, registry.PutOptions{})
	r.mustKeep(err)
	return digest.FromBytes(raw)
}

// down are the origins that don't answer.
func (r *rig) down() (out []*fakeOrigin) {
	for _, o := range r.origins {
		o.set(func() {
			if o.down {
				out = append(out, o)
			}
		})
	}
	return out
}

// published runs changes while the bucket is written to.
func (r *rig) published(changes func()) {
	ctx, cancel := context.WithCancel(r.Context())
	was := r.x.keptWait
	r.x.keptWait = time.Minute
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, l := range r.x.lanes {
			if l.name != "" {
				l.run(ctx)
			}
		}
	}()
	changes()
	cancel()
	<-done
	r.x.keptWait = was
}

func (r *rig) delete(ref registry.Reference) {
	r.Helper()
	r.mustKeep(r.x.DeleteManifest(r.Context(), "repo", ref))
}

// lose restores on an empty disk.
func (r *rig) lose() {
	r.Helper()
	r.start("second.db")
	r.must(r.x.fill(r.Context()))
}

func (r *rig) wantTag(tag string, want digest.Digest) {
	r.Helper()
	now, err := r.x.db.Tag(r.Context(), "repo", tag)
	if errors.Is(err, names.ErrNotFound) {
		err = nil
	}
	if err != nil || now.Digest != want {
		r.Errorf("tag %s is %q, %v, want %q", tag, now.Digest, err, want)
	}
}

func (r *rig) wantManifest(d digest.Digest, want bool) {
	r.Helper()
	if ok, err := r.x.hasManifest(r.Context(), "repo", d); err != nil || ok != want {
		r.Errorf("manifest %s: there is one: %v, %v; want %v", d, ok, err, want)
	}
}

func (r *rig) durable(yes bool) {
	for _, o := range r.origins {
		o.set(func() { o.durable = yes })
	}
}

// The bucket is behind all along: what is restored comes from the origins' records alone.
func TestRestoreWithoutTheBucket(t *testing.T) {
	t.Run("a tag that moved keeps both manifests", func(t *testing.T) {
		r := newRig(t)
		a, b := r.put("v", "one"), r.put("v", "two")
		r.lose()
		r.wantTag("v", b)
		r.wantManifest(a, true)
		r.wantManifest(b, true)
	})
	t.Run("a deleted tag leaves its manifest", func(t *testing.T) {
		r := newRig(t)
		a := r.put("v", "one")
		r.delete(registry.Reference{Tag: "v"})
		r.lose()
		r.wantTag("v", "")
		r.wantManifest(a, true)
	})
	t.Run("a deleted manifest takes its tags", func(t *testing.T) {
		r := newRig(t)
		a := r.put("v", "one")
		r.delete(registry.Reference{Digest: a})
		r.lose()
		r.wantTag("v", "")
		r.wantManifest(a, false)
	})
	t.Run("a deleted manifest takes its tags, and what they were before", func(t *testing.T) {
		r := newRig(t)
		r.must(r.x.fill(r.Context()))
		r.durable(true)
		a := r.put("v", "one")
		if left, err := r.x.drain(r.Context()); err != nil || left {
			t.Fatalf("left %v, %v", left, err)
		}
		r.durable(false)
		b := r.put("v", "two")
		r.delete(registry.Reference{Digest: b})
		r.lose()
		r.wantTag("v", "")
		r.wantManifest(a, true)
		r.wantManifest(b, false)
		r.durable(true)
		if left, err := r.x.drain(r.Context()); err != nil || left {
			t.Fatalf("left %v, %v", left, err)
		}
		for _, o := range r.origins {
			o.set(func() { clear(o.names) })
		}
		r.start("third.db")
		r.must(r.x.fill(r.Context()))
		r.wantTag("v", "")
	})
	t.Run("what was pushed again is there", func(t *testing.T) {
		r := newRig(t)
		a := r.put("v", "one")
		r.delete(registry.Reference{Digest: a})
		r.put("v", "one")
		r.lose()
		r.wantTag("v", a)
		r.wantManifest(a, true)
	})
	t.Run("a deletion waits for the push before it", func(t *testing.T) {
		r := newRig(t)
		r.put("v", "one")
		r.delete(registry.Reference{Tag: "v"})
		if left, err := r.x.drain(r.Context()); err != nil || !left {
			t.Fatalf("left %v, %v", left, err)
		}
		r.lose()
		r.wantTag("v", "")
	})
}

// A push and a deletion reach the bucket, in order, and the origins forget them.
func TestOutboxReachesTheBucket(t *testing.T) {
	r := newRig(t)
	r.must(r.x.fill(t.Context()))
	r.durable(true)
	a, b := r.put("v", "one"), r.put("w", "two")
	r.delete(registry.Reference{Tag: "w"})
	if left, err := r.x.drain(r.Context()); err != nil || left {
		t.Fatalf("left %v, %v", left, err)
	}
	if n := r.origins[0].kept() + r.origins[1].kept(); n != 0 {
		t.Errorf("origins keep %d records", n)
	}
	r.lose()
	r.wantTag("v", a)
	r.wantTag("w", "")
	r.wantManifest(b, true)
}

// An origin that was away when names were restored is heard when it is back.
func TestLateOriginIsHeard(t *testing.T) {
	r := newRig(t)
	a := r.put("v", "one")
	r.origins[1].set(func() { clear(r.origins[1].names) }) // the first origin alone keeps it
	only := digest.FromString("only there")
	r.origins[0].set(func() {
		r.origins[0].pending = []cluster.PendingBlob{{Digest: only, Size: 10, Repositories: []string{"repo"}}}
		r.origins[0].down = true
	})
	r.lose()
	r.wantManifest(a, false)
	r.start("second.db") // a restart does not forget whom to ask
	if err := r.x.reconcile(r.Context(), r.x.origins.All()); err == nil {
		t.Error("an origin could not be asked, and nobody says so")
	}
	r.origins[0].set(func() { r.origins[0].down = false })
	r.must(r.x.reconcile(r.Context(), r.x.origins.All()))
	r.wantTag("v", a)
	if _, err := r.x.getLayer(r.Context(), "repo", only); err != nil {
		t.Errorf("a blob that the late origin owes: %v", err)
	}
}

// A database that went back in time takes over what an origin keeps when that is heard first, although it was written
// to since.
func TestOriginIsHeardAfterLaterWrites(t *testing.T) {
	r := newRig(t)
	r.origins = append(r.origins, newFakeOrigin(t), newFakeOrigin(t))
	r.start("first.db")
	r.must(r.x.fill(r.Context()))
	r.put("v", "one")
	r.stop()
	r.copyDatabase("first.db", "older.db")
	before := map[*fakeOrigin]int{}
	for _, o := range r.origins {
		before[o] = o.kept()
	}
	r.start("first.db")
	r.must(r.x.fill(r.Context()))
	a := r.put("v", "two")
	for _, o := range r.origins {
		away := o.kept() > before[o]
		o.set(func() { o.down = away })
	}
	r.start("older.db")
	if err := r.x.reconcile(r.Context(), r.x.origins.All()); err == nil || r.x.heard() {
		t.Fatalf("two origins are away: heard %v, %v", r.x.heard(), err)
	}
	r.must(r.x.putLayer(r.Context(), "other", cluster.Layer{Digest: digest.FromString("three"), Size: 5}))
	for _, o := range r.origins {
		o.set(func() { o.down = false })
	}
	r.must(r.x.reconcile(r.Context(), r.x.origins.All()))
	r.wantTag("v", a)
	r.must(r.x.reconcile(r.Context(), r.x.origins.All()))
	r.wantTag("v", a)
}

// An origin that was away while names went to the bucket and were deleted does not bring them back.
func TestStaleRecordsAreTakenBack(t *testing.T) {
	r := newRig(t)
	r.durable(true)
	r.must(r.x.fill(r.Context()))
	r.put("v", "one")
	r.origins[1].set(func() { r.origins[1].down = true })
	if _, err := r.x.drain(r.Context()); err != nil {
		t.Fatal(err)
	}
	r.published(func() { r.delete(registry.Reference{Tag: "v"}) })
	r.origins[1].set(func() { r.origins[1].down = false })
	r.x.writing = writing{} // as after a while
	r.must(r.x.reconcile(r.Context(), r.x.origins.All()))
	r.wantTag("v", "")
	if n := r.origins[1].kept(); n != 0 {
		t.Errorf("the origin that was away keeps %d records", n)
	}
}

// What an origin has of a change that SQL lost (its disk went back in time) is adopted; what may be under way is left
// alone.
func TestRecordsNewerThanSQL(t *testing.T) {
	r := newRig(t)
	r.must(r.x.fill(r.Context()))
	a := r.put("v", "one")
	var newer cluster.NameRecord
	r.must(r.x.eachRecord(r.Context(), r.x.origins.All()[0], func(e entry) error { newer = e.record; return nil }))
	newer.Tag, newer.Generation, newer.Time = "w", newer.Generation+1, time.Now()
	newer = r.x.signer.Sign(newer)
	r.origins[0].set(func() { r.origins[0].names[cluster.NameKey(newer)] = newer })
	r.x.writing.begin([]cluster.NameRecord{newer})
	r.must(r.x.reconcile(r.Context(), r.x.origins.All()))
	r.wantTag("w", "")
	r.x.writing = writing{}
	r.must(r.x.reconcile(r.Context(), r.x.origins.All()))
	r.wantTag("w", a)
	if r.origins[0].kept() == 0 {
		t.Error("records that the bucket lacks were taken back")
	}
}

var errUnreachable = errors.New("connection refused")

// unreachable is a bucket that does not answer until it is set to.
func unreachable(r *rig) *broken {
	b := &broken{fail: func(string, string) error { return errUnreachable }}
	r.wrap = func(real bucket.Bucket) bucket.Bucket { b.Bucket = real; return b }
	return b
}

// reads wants what a client is told of a tag; an empty digest is "not known now".
func (r *rig) reads(what, tag string, want digest.Digest) {
	r.Helper()
	m, err := r.x.manifest(r.Context(), "repo", registry.Reference{Tag: tag})
	if want == "" {
		if !errors.Is(err, registry.ErrUnavailable) {
			r.Errorf("%s: tag %s is %q, %v, want %v", what, tag, m.Digest, err, registry.ErrUnavailable)
		}
		return
	}
	if err != nil || m.Digest != want {
		r.Errorf("%s: tag %s is %q, %v, want %q", what, tag, m.Digest, err, want)
	}
}

// A record that an origin keeps because it was away when the others forgot it may be older than the bucket: while that
// does not answer, a lost database does not make it the truth, not even after another start.
func TestStaleRecordIsNoTruth(t *testing.T) {
	r := newRig(t)
	r.durable(true)
	r.must(r.x.fill(r.Context()))
	old := r.put("v", "one")
	r.origins[1].set(func() { r.origins[1].down = true })
	if left, err := r.x.drain(r.Context()); err != nil || left {
		t.Fatalf("left %v, %v", left, err)
	}
	var now digest.Digest
	r.published(func() { now = r.put("v", "two") })
	if left, err := r.x.drain(r.Context()); err != nil || left {
		t.Fatalf("left %v, %v", left, err)
	}
	r.origins[1].set(func() { r.origins[1].down = false })
	if r.origins[1].kept() == 0 {
		t.Fatal("no origin keeps a record")
	}
	b := unreachable(r)
	for _, start := range []string{"first", "second"} {
		r.start("lost.db")
		if err := r.x.fill(r.Context()); !errors.Is(err, errUnreachable) || !r.x.heard() {
			t.Fatalf("%s start: heard %v, %v", start, r.x.heard(), err)
		}
		r.reads(start+" start, without the bucket", "v", "")
	}
	pushed := r.put("w", "three") // what this process has written needs no bucket
	r.reads("pushed, without the bucket", "w", pushed)
	if _, err := r.x.getLayer(r.Context(), "repo", digest.FromString("three")); err != nil {
		t.Errorf("its layer: %v", err)
	}
	r.delete(registry.Reference{Tag: "w"})
	if m, err := r.x.manifest(r.Context(), "repo", registry.Reference{Tag: "w"}); !errors.Is(err, names.ErrNotFound) {
		t.Errorf("deleted, without the bucket: %s, %v", m.Digest, err)
	}
	b.set(nil)
	r.reads("with the bucket", "v", now)
	r.must(r.x.fill(r.Context()))
	r.reads("restored", "v", now)
	r.wantManifest(old, true)
}

// What a tag is that was pushed is known, whatever records of it there were and although the bucket does not answer.
func TestPushedOverAStaleRecord(t *testing.T) {
	r := newRig(t)
	r.must(r.x.fill(r.Context()))
	r.put("v", "one")
	unreachable(r)
	r.start("lost.db")
	if err := r.x.fill(r.Context()); !errors.Is(err, errUnreachable) || !r.x.heard() {
		t.Fatalf("heard %v, %v", r.x.heard(), err)
	}
	r.reads("without the bucket", "v", "")
	r.reads("pushed", "v", r.put("v", "two"))
}

// A record whose manifest is in the bucket alone, which does not answer, is not passed over: what the tag was before is
// not what it is.
func TestRecordThatCannotBeReadNow(t *testing.T) {
	r := newRig(t)
	r.durable(true)
	r.must(r.x.fill(r.Context()))
	one := r.put("w", "one")
	two := r.put("v", "two")
	if left, err := r.x.drain(r.Context()); err != nil || left {
		t.Fatalf("left %v, %v", left, err)
	}
	raw, err := r.x.db.Manifest(r.Context(), "repo", registry.Reference{Digest: one})
	r.must(err)
	_, err = r.x.PutManifest(r.Context(), "repo", registry.Reference{Tag: "v"}, raw.MediaType, raw.Bytes, registry.PutOptions{})
	r.must(err)
	for _, o := range r.origins { // as if the bytes were in an earlier record, that went
		o.set(func() {
			for k, rec := range o.names {
				rec.Bytes, rec.Version = nil, cluster.NameRef
				o.names[k] = r.x.signer.Sign(rec)
			}
		})
	}
	for _, away := range []bool{false, true} { // while an origin is away, too
		b := unreachable(r)
		r.start(fmt.Sprintf("lost%v.db", away))
		if err := r.x.fill(r.Context()); !errors.Is(err, errUnreachable) {
			t.Fatal(err)
		}
		b.set(nil)
		r.reads("before the record was looked at again", "v", "")
		r.must(r.x.fill(r.Context()))
		r.origins[1].set(func() { r.origins[1].down = away })
		if err := r.x.reconcile(r.Context(), r.x.origins.All()); (err != nil) != away {
			t.Fatal(err)
		}
		r.reads("after that", "v", one)
		r.wantManifest(two, true)
	}
	r.origins[1].set(func() { r.origins[1].down = false })
	unreachable(r)
	r.start("lost.db")
	for range 2 { // what is pushed meanwhile is known, also after another look at the record
		if err := r.x.fill(r.Context()); !errors.Is(err, errUnreachable) {
			t.Fatal(err)
		}
		r.reads("pushed", "v", r.put("v", "three"))
		r.must(r.x.reconcile(r.Context(), r.x.origins.All()))
		r.reads("pushed, and records looked at", "v", mustTag(r, "v"))
	}
}

// A tag that was pushed is known, although a round that began before notes then that an older record of it can't be
// read.
func TestPushedWhileARecordIsPutOff(t *testing.T) {
	r := newRig(t)
	r.must(r.x.fill(r.Context()))
	old := r.x.generation.Load() + 1
	d := r.put("v", "one")
	r.x.unproven.setLater([]cluster.Change{cluster.PutTag("repo", "v", digest.FromString("old")).At(old)}, false)
	r.reads("pushed later than the record", "v", d)
	r.x.unproven.setLater([]cluster.Change{cluster.PutTag("repo", "v", digest.FromString("new")).At(math.MaxInt64)}, false)
	r.reads("pushed before the record", "v", "")
}

func mustTag(r *rig, tag string) digest.Digest {
	r.Helper()
	v, err := r.x.db.Tag(r.Context(), "repo", tag)
	r.must(err)
	return v.Digest
}
