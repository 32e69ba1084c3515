package origin

import (
	"encoding/json"
	"errors"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/origin/store"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// keeper is an origin as far as name records go, with a client of it.
func keeper(t *testing.T, keys cluster.NameKeys) (*Origin, *cluster.OriginClient) {
	t.Helper()
	s, err := store.Open(store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	o := &Origin{log: slog.New(slog.DiscardHandler), store: s, nameKeys: keys}
	o.m = newMetrics(prometheus.NewRegistry(), o)
	x, err := o.extension()
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(registry.Server{Dialect: cluster.Dialect(), Extension: x}.Handler())
	t.Cleanup(srv.Close)
	c, err := cluster.NewOriginClient(srv.URL, srv.Client())
	if err != nil {
		t.Fatal(err)
	}
	return o, c
}

func manifestRecord(raw string) cluster.NameRecord {
	return cluster.NameRecord{
		Version: 1, Kind: "manifest", Repository: "repo", Tag: "v1", Digest: digest.FromString(raw), MediaType: "a/b", Size: int64(len(raw)),
		Bytes: []byte(raw), Generation: time.Now().UnixMicro(), Time: time.Now().UTC(),
	}
}

func held(t *testing.T, c *cluster.OriginClient) (n int) {
	t.Helper()
	if err := c.Names(t.Context(), func([]byte) error { n++; return nil }); err != nil {
		t.Fatal(err)
	}
	return n
}

// While one build-index holds the origin another one, which says so, changes no record.
func TestRecordsOfAnotherHolder(t *testing.T) {
	_, c := keeper(t, nil)
	r := manifestRecord("{}")
	if _, err := c.Hold(t.Context(), cluster.HolderRequest{Holder: "this", For: time.Minute}); err != nil {
		t.Fatal(err)
	}
	if err := c.PutName(t.Context(), r, "another"); !errors.Is(err, registry.ErrHeld) || held(t, c) != 0 {
		t.Errorf("a record of another: %v, %d held", err, held(t, c))
	}
	for _, holder := range []string{"this", ""} { // a build-index of the version before does not say who it is
		if err := c.PutName(t.Context(), r, holder); err != nil || held(t, c) != 1 {
			t.Errorf("a record of %q: %v, %d held", holder, err, held(t, c))
		}
	}
	gone := (*cluster.NameSigner)(nil).Deletion(r)
	if err := c.DeleteName(t.Context(), gone, "another"); !errors.Is(err, registry.ErrHeld) || held(t, c) != 1 {
		t.Errorf("a deletion of another: %v, %d held", err, held(t, c))
	}
	if _, err := c.Hold(t.Context(), cluster.HolderRequest{Holder: "this"}); err != nil { // it ends
		t.Fatal(err)
	}
	if err := c.DeleteName(t.Context(), gone, "another"); err != nil || held(t, c) != 0 {
		t.Errorf("a deletion when nobody holds: %v, %d held", err, held(t, c))
	}
}

// What does not hold is not kept, whoever sends it; where keys are configured, neither is what build-index has not
// signed.
func TestRecordsAreCheckedWhenWritten(t *testing.T) {
	signer, _, err := cluster.OpenNameSigner(filepath.Join(t.TempDir(), "key"))
	if err != nil {
		t.Fatal(err)
	}
	stranger, _, err := cluster.OpenNameSigner(filepath.Join(t.TempDir(), "key"))
	if err != nil {
		t.Fatal(err)
	}
	for _, keys := range []cluster.NameKeys{nil, {signer.Public()}} {
		o, c := keeper(t, keys)
		for name, change := range map[string]func(*cluster.NameRecord){
			"a generation near the last there is": func(r *cluster.NameRecord) { r.Generation = math.MaxInt64 - 1 },
			"a generation that makes it wrap":     func(r *cluster.NameRecord) { r.Generation = math.MaxInt64 - 6 },
			"a generation before all":             func(r *cluster.NameRecord) { r.Generation = -1 },
			"bytes of another digest":             func(r *cluster.NameRecord) { r.Bytes = []byte("[]") },
			"no bytes":                            func(r *cluster.NameRecord) { r.Bytes = nil },
			"a media type that is none":           func(r *cluster.NameRecord) { r.MediaType = "../x" },
			"a tag that is none":                  func(r *cluster.NameRecord) { r.Tag = "../x" },
			"a kind that is not known":            func(r *cluster.NameRecord) { r.Kind = "x" },
			"a time of tomorrow":                  func(r *cluster.NameRecord) { r.Time = r.Time.AddDate(0, 0, 1) },
		} {
			r := manifestRecord("{}")
			change(&r)
			if err := c.PutName(t.Context(), signer.Sign(r), ""); !errors.Is(err, registry.ErrRecordInvalid) {
				t.Errorf("%s: %v", name, err)
			}
		}
		for name, s := range map[string]*cluster.NameSigner{"nobody": nil, "a stranger": stranger} {
			if err := c.PutName(t.Context(), s.Sign(manifestRecord("{}")), ""); errors.Is(err, registry.ErrDenied) != (keys != nil) {
				t.Errorf("%d keys, signed by %s: %v", len(keys), name, err)
			}
		}
		good := signer.Sign(manifestRecord("{}"))
		if err := c.PutName(t.Context(), good, ""); err != nil || held(t, c) != 1 {
			t.Errorf("%d keys: a good record: %v, %d held", len(keys), err, held(t, c))
		}
		if err := c.DeleteName(t.Context(), stranger.Deletion(good), ""); errors.Is(err, registry.ErrDenied) != (keys != nil) {
			t.Errorf("%d keys: a stranger's deletion: %v", len(keys), err)
		}
		if err := c.DeleteName(t.Context(), signer.Deletion(good), ""); err != nil || held(t, c) != 0 {
			t.Errorf("%d keys: build-index's deletion: %v, %d held", len(keys), err, held(t, c))
		}
		if err := o.checkNames(t.Context()); (err != nil) != (keys == nil) {
			t.Errorf("%d keys: readiness: %v", len(keys), err)
		}
	}
}

// A record that was planted before records were checked, and has the highest generation there is, keeps no honest one
// out.
func TestPlantedRecordIsReplaced(t *testing.T) {
	o, c := keeper(t, nil)
	planted := manifestRecord("{}")
	planted.Generation = math.MaxInt64 - 1
	b, err := json.Marshal(planted)
	if err != nil {
		t.Fatal(err)
	}
	key := cluster.NameKey(planted)
	if err := errors.Join(o.store.PutName(key, b), o.store.PutName("ab", []byte("not JSON"))); err != nil {
		t.Fatal(err)
	}
	good := manifestRecord("{}")
	if err := c.PutName(t.Context(), good, ""); err != nil {
		t.Fatal(err)
	}
	if now, err := o.parseHeld(o.store.Name(key)); err != nil || now.Generation != good.Generation {
		t.Errorf("%+v is held, %v", now, err)
	}
	if held(t, c) != 1 || o.unreadable.Load() != 1 {
		t.Errorf("%d held, %d unreadable", held(t, c), o.unreadable.Load())
	}
}

// Of changes of one record that come at once the newest stays: an older one that comes late does not replace it, nor
// does the deletion of what was held before.
func TestRecordsThatChangeAtOnce(t *testing.T) {
	o, c := keeper(t, nil)
	old := manifestRecord("{}")
	key := cluster.NameKey(old)
	for range 200 {
		old.Generation += 2
		b, err := json.Marshal(old)
		if err == nil {
			err = o.store.PutName(key, b)
		}
		if err != nil {
			t.Fatal(err)
		}
		now := old
		now.Generation++
		var wg sync.WaitGroup
		for _, f := range []func() error{
			func() error { return c.PutName(t.Context(), now, "") }, func() error { return c.PutName(t.Context(), old, "") },
			func() error {
				return c.DeleteName(t.Context(), cluster.NameDeletion{Repository: old.Repository, Key: key, Generation: old.Generation}, "")
			},
		} {
			wg.Go(func() {
				if err := f(); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if held, err := o.parseHeld(o.store.Name(key)); err != nil || held.Generation != now.Generation {
			t.Fatalf("generation %d is held, %v, want %d", held.Generation, err, now.Generation)
		}
	}
}

// Who asks for a deletion in a wrong form is told the right one.
func TestDeletionSaysWhatItWants(t *testing.T) {
	o, _ := keeper(t, nil)
	key := cluster.NameKey(manifestRecord("{}"))
	for query, want := range map[string]string{
		"":                             "want ?generation=<number>",
		"?generation=x":                "want ?generation=<number>",
		"?generation=1&signature=%21":  "want signature=<base64url",
		"?generation=1":                "",
		"?generation=1&signature=AAAA": "",
	} {
		w := httptest.NewRecorder()
		x, err := o.extension()
		if err != nil {
			t.Fatal(err)
		}
		h := registry.Server{Dialect: cluster.Dialect(), Extension: x}.Handler()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodDelete, "/v2/repo/_kraken/names/"+key+query, nil))
		var body struct{ Errors []struct{ Message string } }
		if want == "" {
			if w.Code != http.StatusAccepted {
				t.Errorf("%q: %d %s", query, w.Code, w.Body)
			}
			continue
		}
		if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil || w.Code != http.StatusBadRequest || len(body.Errors) != 1 || !strings.Contains(body.Errors[0].Message, want) {
			t.Errorf("%q: %d %s, want %q", query, w.Code, w.Body, want)
		}
	}
}
