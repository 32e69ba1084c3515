package buildindex

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/buildindex/names"
	"kraken/origin/bucket"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/role"
)

// second opens a further build-index beside the one of the rig.
func (r *rig) second(database string) *Index {
	r.Helper()
	y, err := New(r.config(database), role.Deps{Log: slog.New(slog.DiscardHandler), Registry: prometheus.NewRegistry()})
	r.must(err)
	return y
}

// A second build-index beside the first waits, with words, changes nothing, and goes on when the first is gone: on the
// same disk, and on another one.
func TestSecondBuildIndexWaits(t *testing.T) {
	for database, want := range map[string]error{"first.db": errBusy, "other.db": errHeld} {
		t.Run(database, func(t *testing.T) {
			r := newRig(t)
			r.must(r.x.takeOver(t.Context()))
			r.must(r.x.fill(t.Context()))
			a := r.put("v", "one")
			kept := r.origins[0].kept()
			y := r.second(database)
			defer y.Close()
			err := y.takeOver(t.Context())
			if !errors.Is(err, want) || !strings.Contains(err.Error(), "stop it") {
				t.Errorf("%v, want %v, and what to do", err, want)
			}
			y.setReason(err)
			if err := y.checkTenure(t.Context()); !errors.Is(err, want) {
				t.Errorf("readiness says %v", err)
			}
			w := httptest.NewRecorder()
			h, err := y.handler(prometheus.NewRegistry())
			if err != nil {
				t.Fatal(err)
			}
			h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/v2/repo/manifests/v", nil))
			if w.Code != http.StatusServiceUnavailable || !strings.Contains(w.Body.String(), "another build-index") {
				t.Errorf("a pull from it: %d, %s", w.Code, w.Body)
			}
			if n := r.origins[0].kept(); n != kept {
				t.Errorf("an origin keeps %d records, %d before", n, kept)
			}
			_, err = r.x.renew(t.Context(), 0) // as at its end
			r.must(err)
			r.stop()
			r.must(y.takeOver(t.Context()))
			r.must(y.fill(t.Context()))
			if now, err := y.db.Tag(t.Context(), "repo", "v"); err != nil || now.Digest != a {
				t.Errorf("the second has the tag at %v, %v", now, err)
			}
		})
	}
}

// A restart on the same disk does not wait for the end of its own lease; one that has lost its lease ends.
func TestLease(t *testing.T) {
	r := newRig(t)
	r.must(r.x.takeOver(t.Context()))
	r.start("first.db") // as after kill -9
	r.must(r.x.takeOver(t.Context()))
	for _, o := range r.origins {
		o.set(func() { o.holder = holder{} })
	}
	y := r.second("other.db")
	defer y.Close()
	r.must(y.takeOver(t.Context()))
	if _, err := r.x.renew(t.Context(), holdFor); !errors.Is(err, errHeld) {
		t.Errorf("the first renews: %v", err)
	}
	for _, o := range r.origins {
		o.set(func() { o.down = true })
	}
	if _, err := y.renew(t.Context(), holdFor); !errors.Is(err, registry.ErrUnavailable) {
		t.Errorf("without origins: %v", err)
	}
}

// copyDatabase copies the database of the rig, which does not run, as a snapshot of a machine does.
func (r *rig) copyDatabase(from, to string) {
	r.Helper()
	for _, suffix := range []string{"", "-wal", "-shm"} {
		b, err := os.ReadFile(filepath.Join(r.dir, from+suffix))
		if errors.Is(err, os.ErrNotExist) {
			r.must(errors.Join(ignoreNotExist(os.Remove(filepath.Join(r.dir, to+suffix)))))
			continue
		}
		r.must(err)
		r.must(os.WriteFile(filepath.Join(r.dir, to+suffix), b, 0o600))
	}
}

func ignoreNotExist(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// A copy of the database beside it, as of a folder or of a whole machine with its name, is another build-index.
func TestCopiedDatabaseWaits(t *testing.T) {
	r := newRig(t)
	r.must(r.x.takeOver(t.Context()))
	r.stop()
	r.copyDatabase("first.db", "copy.db")
	r.start("first.db")
	r.must(r.x.takeOver(t.Context()))
	y := r.second("copy.db")
	defer y.Close()
	if err := y.takeOver(t.Context()); !errors.Is(err, errHeld) {
		t.Errorf("the copy begins beside the first: %v, want %v", err, errHeld)
	}
}

// One that has given its lease back, and drains, answers no request any more: the next one may have begun.
func TestEndedAnswersNothing(t *testing.T) {
	r := newRig(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- r.x.hold(ctx) }()
	<-r.x.tenure.begun
	r.must(r.x.sure())
	cancel()
	r.must(<-done)
	if err := r.x.sure(); !errors.Is(err, registry.ErrUnavailable) {
		t.Errorf("after its end: %v, want %v", err, registry.ErrUnavailable)
	}
}

// An older copy of the database gives no wrong answer: what it has counts only once it was looked up. Its age is known
// from the bucket alone, from the origins alone, and from the records of what the bucket lacks.
func TestOlderDatabase(t *testing.T) {
	for _, known := range []string{"bucket", "origins", "records"} {
		t.Run(known, func(t *testing.T) {
			r := newRig(t)
			r.must(r.x.takeOver(t.Context()))
			r.must(r.x.fill(t.Context()))
			r.durable(true)
			r.put("moved", "one")
			deleted := r.put("deleted", "two")
			r.put("same", "three")
			r.publish()
			r.stop()
			r.copyDatabase("first.db", "snapshot.db")
			r.start("first.db")
			r.must(r.x.takeOver(t.Context()))
			r.must(r.x.fill(t.Context()))
			moved := r.put("moved", "four")
			fresh := r.put("fresh", "five")
			r.delete(registry.Reference{Tag: "deleted"})
			if known != "records" {
				r.publish()
			}
			_, err := r.x.renew(t.Context(), holdFor)
			r.must(err)
			r.x.forgetAcked(t.Context())
			r.stop()
			for _, o := range r.origins {
				o.set(func() {
					if known != "origins" {
						o.holder = holder{} // their disks are lost, records apart
					}
				})
			}
			r.copyDatabase("snapshot.db", "first.db")
			unheard := &broken{}
			unheard.set(func(call, key string) error {
				if known == "origins" && call == "list" && strings.Contains(key, "/kraken/generation/") {
					return bucket.ErrUnavailable
				}
				return nil
			})
			r.wrap = func(b bucket.Bucket) bucket.Bucket { unheard.Bucket = b; return unheard }
			r.start("first.db")
			r.must(r.x.takeOver(t.Context()))
			if r.x.stale.Load() != (known != "records") {
				t.Errorf("known to be older: %v", r.x.stale.Load())
			}
			if _, err := r.x.GetManifest(t.Context(), "repo", registry.Reference{Tag: "moved"}, registry.GetOptions{}); !errors.Is(err, registry.ErrUnavailable) {
				t.Errorf("before anything was heard: %v", err)
			}
			r.must(r.x.hear(t.Context()))
			for _, step := range []string{"merging", "merged", "after a restart"} {
				for tag, want := range map[string]digest.Digest{"moved": moved, "fresh": fresh, "deleted": ""} {
					m, err := r.x.GetManifest(t.Context(), "repo", registry.Reference{Tag: tag}, registry.GetOptions{})
					if want == "" && !errors.Is(err, registry.ErrManifestUnknown) || want != "" && (err != nil || m.Digest != want) {
						t.Errorf("%s: tag %s: %v, %v; want %q", step, tag, m, err, want)
					}
				}
				if step == "merging" {
					r.must(r.x.fill(t.Context()))
				}
				if step == "merged" {
					r.publish()
					r.start("first.db")
					r.must(r.x.takeOver(t.Context()))
					if r.x.stale.Load() {
						t.Error("still older")
					}
					r.must(r.x.fill(t.Context()))
				}
			}
			r.wantManifest(deleted, true)
		})
	}
}

// Run waits for the one before it and serves then.
func TestRunAfterAnother(t *testing.T) {
	r := newRig(t)
	y := r.second("first.db")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- y.Run(ctx) }()
	ask := func() (int, string) {
		resp, err := http.Get("http://" + y.Addr() + "/readiness")
		r.must(err)
		defer resp.Body.Close()
		var b strings.Builder
		_, err = fmt.Fprint(&b, resp.Header, resp.StatusCode)
		r.must(err)
		return resp.StatusCode, b.String()
	}
	if code, body := ask(); code != http.StatusServiceUnavailable {
		t.Errorf("readiness while another runs: %d, %s", code, body)
	}
	r.stop()
	for end := time.Now().Add(20 * time.Second); ; {
		if code, body := ask(); code == http.StatusOK {
			break
		} else if time.Now().After(end) {
			t.Fatalf("not ready after the other is gone: %d, %s", code, body)
		}
		time.Sleep(50 * time.Millisecond)
	}
	cancel()
	r.must(<-done)
	if h := r.origins[0].holder; time.Now().Before(h.until) {
		t.Errorf("at its end the lease is kept: %+v", h)
	}
}

// A renewal of a build-index that is gone may reach an origin late. Who has the lease at replicas others goes on:
// nobody else can begin while these refuse him. Who has it at fewer has lost it, and who has not begun waits.
func TestOneOriginNamesAnother(t *testing.T) {
	r := newRig(t)
	r.origins = append(r.origins, newFakeOrigin(t))
	r.start("three.db")
	r.must(r.x.takeOver(t.Context()))
	named := func(n int) {
		for i, o := range r.origins {
			o.set(func() {
				if o.holder = (holder{id: r.x.tenure.id, until: time.Now().Add(time.Hour)}); i < n {
					o.holder.id = "vm/gone"
				}
			})
		}
	}
	named(1)
	if _, err := r.x.renew(t.Context(), holdFor); err != nil {
		t.Errorf("one of three origins names another: %v", err)
	}
	y := r.second("other.db")
	defer y.Close()
	for o := range 3 {
		r.origins[o].set(func() { r.origins[o].holder.id = r.x.tenure.id })
	}
	if err := y.takeOver(t.Context()); !errors.Is(err, errHeld) {
		t.Errorf("another begins: %v, want %v", err, errHeld)
	}
	for o := range 2 { // the first has one origin still, and two are free
		r.origins[o].set(func() { r.origins[o].holder = holder{} })
	}
	if err := y.takeOver(t.Context()); !errors.Is(err, errHeld) {
		t.Errorf("another begins, whom one origin refuses: %v, want %v", err, errHeld)
	}
	for o := range 2 {
		if h := r.origins[o].holder; h.id == y.tenure.id && time.Now().Before(h.until) {
			t.Errorf("who may not begin keeps an origin from the holder: %+v", h)
		}
	}
	named(2)
	if _, err := r.x.renew(t.Context(), holdFor); !errors.Is(err, errHeld) {
		t.Errorf("two of three origins name another: %v, want %v", err, errHeld)
	}
}

// A build-index that stood still while another took over acknowledges nothing that the other would not know: origins
// refuse its records, and a membership, of which there is no record, is answered only while it is sure of its lease.
func TestStoodStill(t *testing.T) {
	r := newRig(t)
	r.origins = append(r.origins, newFakeOrigin(t))
	r.start("first.db")
	r.must(r.x.takeOver(t.Context()))
	r.must(r.x.fill(t.Context()))
	r.put("v", "one")
	for _, o := range r.origins[:2] { // another has begun at two of three
		o.set(func() { o.holder = holder{id: "vm/other", until: time.Now().Add(time.Hour)} })
	}
	kept := []int{r.origins[0].kept(), r.origins[1].kept(), r.origins[2].kept()}
	_, err := r.push("repo", registry.Reference{Tag: "w"}, layered(t, digest.FromString("one")), registry.PutOptions{})
	if !errors.Is(err, registry.ErrUnavailable) || !errors.Is(err, registry.ErrHeld) {
		t.Errorf("a push: %v, want %v", err, registry.ErrHeld)
	}
	for i, o := range r.origins {
		if o.kept() != kept[i] {
			t.Errorf("origin %d keeps the record of a change that was refused", i+1)
		}
	}
	r.wantTag("w", "")
	if err := r.x.DeleteManifest(t.Context(), "repo", registry.Reference{Tag: "v"}); !errors.Is(err, registry.ErrHeld) {
		t.Errorf("a deletion: %v, want %v", err, registry.ErrHeld)
	}

	h, err := r.x.handler(prometheus.NewRegistry())
	r.must(err)
	pull := func() int {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/v2/repo/manifests/v", nil))
		return w.Code
	}
	if code := pull(); code != http.StatusOK {
		t.Errorf("a pull: %d", code)
	}
	for what, since := range map[string]time.Time{
		"by the clock that only goes on": time.Now().Add(-holdFor - time.Second),
		"by the clock on the wall":       time.Now().Round(0).Add(-holdFor - time.Second),
	} {
		r.x.tenure.looked = since
		layer := cluster.Layer{Digest: digest.FromString("two"), Size: 3}
		if err := r.x.putLayer(t.Context(), "repo", layer); !errors.Is(err, registry.ErrUnavailable) {
			t.Errorf("stood still %s, a membership: %v", what, err)
		}
		if code := pull(); code != http.StatusServiceUnavailable {
			t.Errorf("stood still %s, a pull: %d", what, code)
		}
	}
	r.must(r.x.look(time.Now(), answer{kept: true}, nil))
	if code := pull(); code != http.StatusOK {
		t.Errorf("a pull after origins were asked: %d", code)
	}
	r.must(r.x.look(time.Now().Add(-holdFor-time.Second), answer{kept: true}, nil)) // stopped while it asked: the answers are as old
	if code := pull(); code != http.StatusServiceUnavailable {
		t.Errorf("a pull after old answers: %d", code)
	}
	_ = r.x.look(time.Now(), answer{}, errHeld)
	if code := pull(); code != http.StatusServiceUnavailable {
		t.Errorf("a pull from one that another has followed: %d", code)
	}
}

// A database that comes back after another has begun counts as an older one, whatever generations the two have: the
// other may have taken over, and published, what this one never committed. A restart of the last one does not.
func TestAnotherBeganBefore(t *testing.T) {
	r := newRig(t)
	r.must(r.x.takeOver(t.Context()))
	r.must(r.x.fill(t.Context()))
	r.durable(true)
	r.put("v", "one")
	r.publish()
	end := func() {
		r.x.giveBack(t.Context())
		r.stop()
	}
	end()
	r.copyDatabase("first.db", "copy.db")
	for _, step := range []struct {
		database string
		stale    bool
	}{{"copy.db", false}, {"copy.db", false}, {"first.db", true}, {"first.db", false}, {"copy.db", true}} {
		r.start(step.database)
		r.must(r.x.takeOver(t.Context()))
		if r.x.stale.Load() != step.stale {
			t.Errorf("%s is taken for older: %v", step.database, r.x.stale.Load())
		}
		r.must(r.x.fill(t.Context()))
		end()
	}
}

// Another has begun, and is gone again or stands still itself, while this one stood still or reached nobody: though all
// that answer grant it the lease it does not go on, because it knows nothing of what the other has written. Where
// nobody else had the lease it does; and who stood still is not sure before most have said so.
func TestAnotherCameBetween(t *testing.T) {
	long := holdFor + time.Second
	for what, c := range map[string]struct {
		still   time.Duration // for which it did nothing
		last    string        // whose lease each origin remembers
		down    int           // origins
		ended   bool
		unsure  bool
		without time.Duration // most of the origins
	}{
		"it renews in time":                          {last: "vm/other"},
		"stood still, nobody came":                   {still: long, without: long},
		"stood still, nobody came, most are away":    {still: long, without: long, down: 2, unsure: true},
		"stood still":                                {still: long, without: long, last: "vm/other", ended: true},
		"stood still, and most are away":             {still: long, without: long, last: "vm/other", down: 2, ended: true},
		"stood still, and origins do not remember":   {still: long, without: long, last: "-", ended: true},
		"reached nobody":                             {without: long, last: "vm/other", ended: true},
		"reached nobody, and origins don't remember": {without: long, last: "-"},
	} {
		t.Run(what, func(t *testing.T) {
			r := newRig(t)
			r.origins = append(r.origins, newFakeOrigin(t))
			r.start("first.db")
			r.must(r.x.takeOver(t.Context()))
			for i, o := range r.origins {
				o.set(func() {
					if o.down = i < c.down; c.last != "" {
						o.holder = holder{id: strings.TrimPrefix(c.last, "-"), until: time.Now().Add(-time.Second)}
					}
				})
			}
			r.x.tenure.looked = r.x.tenure.looked.Add(-c.still)
			r.x.tenure.most = r.x.tenure.most.Add(-c.without)
			began := time.Now()
			a, err := r.x.ask(t.Context(), holdFor)
			ended := r.x.look(began, a, err)
			if (ended != nil) != c.ended {
				t.Errorf("ended: %v, want that it is: %v", ended, c.ended)
			}
			if err := r.x.sure(); (err != nil) != (c.ended || c.unsure) {
				t.Errorf("it answers: %v", err)
			}
		})
	}
}

// Of two build-indexes one goes on, and one begins, however many origins there are and whichever have restarted, and so
// forgotten the lease: who has most of them. With three origins, one of which is down, two are enough.
func TestMostOriginsDecide(t *testing.T) {
	r := newRig(t)
	for len(r.origins) < 5 {
		r.origins = append(r.origins, newFakeOrigin(t))
	}
	r.start("first.db")
	r.must(r.x.takeOver(t.Context()))
	y := r.second("other.db")
	defer y.Close()
	r.must(y.identify(t.Context()))
	mine := func(x *Index, of ...int) {
		for _, i := range of {
			r.origins[i].set(func() { r.origins[i].holder = holder{id: x.tenure.id, until: time.Now().Add(time.Hour)} })
		}
	}
	mine(y, 1, 2, 3, 4)
	r.must(y.compare(t.Context(), 0))
	close(y.tenure.begun) // at the other four, while the first and one origin were cut off
	mine(r.x, 0, 1)       // the second origin has restarted, and the first asks before the other
	if _, err := r.x.renew(t.Context(), holdFor); !errors.Is(err, errHeld) {
		t.Errorf("who has two of five origins renews: %v, want %v", err, errHeld)
	}
	if _, err := y.renew(t.Context(), holdFor); err != nil {
		t.Errorf("who has three of five origins renews: %v", err)
	}
}

// Nobody begins who does not have most of the origins: another might have the rest.
func TestNobodyBeginsAtAHalf(t *testing.T) {
	for _, c := range []struct{ origins, down, replicas int }{{1, 0, 1}, {2, 0, 2}, {2, 1, 2}, {3, 1, 2}, {3, 1, 3}, {3, 2, 3}, {4, 1, 2}, {4, 1, 3}, {4, 2, 3}, {5, 2, 4}, {5, 3, 4}} {
		r := newRig(t)
		r.origins = nil
		for i := range c.origins {
			o := newFakeOrigin(t)
			o.set(func() { o.down = i < c.down })
			r.origins = append(r.origins, o)
		}
		r.replicas = c.replicas
		r.start("first.db")
		var want error
		if 2*(c.origins-c.down) <= c.origins || c.down >= c.replicas {
			want = registry.ErrUnavailable
		}
		if err := r.x.takeOver(t.Context()); !errors.Is(err, want) {
			t.Errorf("%+v: %v, want %v", c, err, want)
		}
		r.stop()
	}
}

// A start that waits for the others says nothing of it at first, and then once.
func TestWaitingIsToldOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		x := &Index{log: slog.New(slog.NewTextHandler(&log, nil))}
		for range 100 {
			x.setReason(errHeld)
			if time.Sleep(100 * time.Millisecond); x.tenure.waits.IsZero() {
				t.Fatal("it does not know that it waits")
			}
			if time.Since(x.tenure.waits) < waitQuietly && log.Len() > 0 {
				t.Fatalf("after %s: %s", time.Since(x.tenure.waits), log.String())
			}
		}
		if n := strings.Count(log.String(), "level=WARN"); n != 1 {
			t.Errorf("%d warnings: %s", n, log.String())
		}
	})
}

// While too few origins answer to be told the last generation, the records of what goes into the bucket do not pile up:
// of each key there is the last, and of very many keys some are left to the comparison of each minute.
func TestRecordsToForgetAreBounded(t *testing.T) {
	r := newRig(t)
	r.must(r.x.takeOver(t.Context()))
	r.must(r.x.fill(t.Context()))
	r.durable(true)
	moved := func(tag string, generation int64) cluster.NameRecord {
		return cluster.NewRecord(cluster.DeleteName(cluster.TagName("other", tag)).At(generation), time.Now())
	}
	after := r.x.generation.Load() + 1<<40
	f := &r.x.tenure.forget
	for n := range int64(10) {
		r.x.forgetLater([]cluster.NameRecord{moved("often", after+n), moved("often", after-n)})
		r.x.tenure.asked++
	}
	if n := len(f.by); n != 1 {
		t.Errorf("of one key %d records are kept", n)
	}
	if out := f.take(r.x.tenure.asked - 1); len(out) != 0 {
		t.Errorf("%+v is to be forgotten before it is known that it was committed", out)
	}
	if out := f.take(r.x.tenure.asked); len(out) != 1 || out[0].Generation != after+9 {
		t.Errorf("%+v is to be forgotten, want the last", out)
	}
	for i := range maxForget + 100 {
		r.x.forgetLater([]cluster.NameRecord{moved(fmt.Sprint(i), after)})
	}
	r.put("v", "one")
	r.publish()
	if n := len(f.by); n != maxForget {
		t.Errorf("%d records are kept, want %d", n, maxForget)
	}
	*f = forgets{}
	if r.origins[0].kept() == 0 {
		t.Fatal("there was room")
	}
	r.x.writing = writing{} // some time later
	r.must(r.x.reconcile(t.Context(), r.x.origins.All()))
	if n := r.origins[0].kept() + r.origins[1].kept(); n != 0 {
		t.Errorf("%d records of what the bucket has stay at origins", n)
	}
}

// A database that goes back to between two commits is known to be older, although what was committed last is of an
// earlier generation: from the bucket alone, and from the origins alone.
func TestOlderByAnEarlierGeneration(t *testing.T) {
	for _, known := range []string{"bucket", "origins"} {
		t.Run(known, func(t *testing.T) {
			r := newRig(t)
			r.must(r.x.takeOver(t.Context()))
			r.must(r.x.fill(t.Context()))
			r.durable(true)
			rec, err := r.x.record(cluster.PutTag("repo", "slow", digest.FromString("")))
			r.must(err)
			r.put("fast", "one")
			renew := func() {
				r.publish()
				_, err := r.x.renew(t.Context(), holdFor)
				r.must(err)
				r.x.forgetAcked(t.Context())
			}
			renew()
			r.stop()
			r.copyDatabase("first.db", "between.db")
			r.start("first.db")
			r.must(r.x.takeOver(t.Context()))
			r.must(r.x.fill(t.Context()))
			b := raw("", "a/slow")
			p, err := parseManifest("", b)
			r.must(err)
			rec.Digest, rec.MediaType, rec.Size, rec.Bytes = digest.FromBytes(b), p.mediaType, int64(len(b)), b
			_, err = r.x.storeRecord(t.Context(), r.x.signer.Sign(rec), b)
			r.must(err)
			r.must(r.x.db.Update(t.Context(), func(tx names.Tx) error { return errors.Join(r.x.apply(tx, rec, p), r.x.enqueue(tx, rec)) }))
			r.publish()
			if r.x.forgetAcked(t.Context()); r.origins[0].kept() == 0 {
				t.Error("a record is forgotten before anybody was told of its commit")
			}
			renew()
			if n := r.origins[0].kept(); n != 0 {
				t.Errorf("an origin keeps %d records", n)
			}
			r.stop()
			r.copyDatabase("between.db", "first.db")
			for _, o := range r.origins {
				o.set(func() {
					if known == "bucket" {
						o.holder = holder{}
					}
				})
			}
			unheard := &broken{}
			unheard.set(func(call, key string) error {
				if known == "origins" && call == "list" && strings.Contains(key, "/kraken/generation/") {
					return bucket.ErrUnavailable
				}
				return nil
			})
			r.wrap = func(b bucket.Bucket) bucket.Bucket { unheard.Bucket = b; return unheard }
			r.start("first.db")
			r.must(r.x.takeOver(t.Context()))
			if !r.x.stale.Load() {
				t.Error("it is not known to be older")
			}
			r.must(r.x.fill(t.Context()))
			r.wantTag("slow", rec.Digest)
		})
	}
}
