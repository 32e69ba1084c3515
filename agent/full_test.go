package agent

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/config"
	"kraken/proto/registry"
	"kraken/proto/ring"
	"kraken/proto/role"
	"kraken/test/mounts"
)

// onSmallDisk starts an agent whose cache is on a file system of its own.
func onSmallDisk(t *testing.T, o *source, size int64) (a *running, dir string) {
	t.Helper()
	url, _ := lonely(t, atOnce(), o.infos)
	dir = mounts.Small(t, size)
	a = startWith(t, Config{
		Config: role.Config{Origins: []ring.Member{{ID: "o", URL: o.URL}}}, Tracker: role.Endpoint{URL: url},
		Peer: Peer{StallTimeout: config.Duration(time.Minute)}, Cache: Cache{Dir: dir + "/cache"},
	})
	return a, dir
}

// TestFullDiskRelays: an agent without a free byte serves small blobs, large ones and parts of them, and caches again
// when there is room.
func TestFullDiskRelays(t *testing.T) {
	if !mounts.Alone(t) {
		return
	}
	small, held, large := noise(1, 300_000), noise(2, 3_000), noise(3, 3<<20)
	o := newSource(t, small, held, large)
	o.allow(everything)
	a, dir := onSmallDisk(t, o, 16<<20)
	a.sizes.Add(digest.FromBytes(small), int64(len(small)))
	a.sizes.Add(digest.FromBytes(held), int64(len(held)))
	empty := mounts.Fill(t, dir, 0)
	for range 2 {
		for _, b := range [][]byte{small, held, large} {
			if err := a.whole(b); err != nil {
				t.Errorf("a blob of %d bytes: %v", len(b), err)
			}
		}
	}
	part, err := a.get(context.Background(), digest.FromBytes(large), "1000000-1000099")
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(part)
	if err = errors.Join(err, part.Close()); err != nil || string(got) != string(large[1000000:1000100]) {
		t.Errorf("a part: %d bytes, %v", len(got), err)
	}
	if err := a.store.CheckSpace(context.Background()); err == nil || !strings.Contains(err.Error(), dir+" has 0 bytes free") {
		t.Errorf("readiness says %v", err)
	}
	empty()
	for _, b := range [][]byte{small, held, large} {
		if err := a.whole(b); err != nil {
			t.Error(err)
		}
		eventually(t, "the blob is cached", func() bool { return a.cached(digest.FromBytes(b)) })
	}
}

// TestDiskFillsUpMidway: who reads a blob while the disk fills up gets the rest from the origins.
func TestDiskFillsUpMidway(t *testing.T) {
	if !mounts.Alone(t) {
		return
	}
	large, followed := noise(4, 6<<20), noise(5, 900_000)
	o := newSource(t, large, followed)
	a, dir := onSmallDisk(t, o, 16<<20)
	a.sizes.Add(digest.FromBytes(followed), int64(len(followed)))
	for _, b := range [][]byte{followed, large} {
		o.allow(int64(len(b) / 3))
		body, err := a.get(context.Background(), digest.FromBytes(b), "")
		if err != nil {
			t.Fatal(err)
		}
		first := make([]byte, len(b)/8)
		if _, err := io.ReadFull(body, first); err != nil {
			t.Fatal(err)
		}
		empty := mounts.Fill(t, dir, 0)
		o.allow(everything)
		rest, err := io.ReadAll(body)
		if err = errors.Join(err, body.Close()); err != nil || string(first)+string(rest) != string(b) {
			t.Errorf("%d of %d bytes came: %v", len(first)+len(rest), len(b), err)
		}
		empty()
		eventually(t, "the pull has ended", func() bool { return a.pulling() == 0 })
	}
}

// TestPinnedFullRelays: a cache that is pinned full relays what it has no room for.
func TestPinnedFullRelays(t *testing.T) {
	pinned, more := noise(6, 3<<20), noise(7, 3<<20)
	o := newSource(t, pinned, more)
	o.allow(everything)
	url, _ := lonely(t, atOnce(), o.infos)
	a := startWith(t, Config{
		Config: role.Config{Origins: []ring.Member{{ID: "o", URL: o.URL}}}, Tracker: role.Endpoint{URL: url},
		Peer: Peer{StallTimeout: config.Duration(time.Minute)}, Cache: Cache{Capacity: 4 << 20},
	})
	if err := a.store.Pin(digest.FromBytes(pinned)); err != nil {
		t.Fatal(err)
	}
	if err := a.whole(pinned); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the blob is cached", func() bool { return a.cached(digest.FromBytes(pinned)) })
	for range 3 {
		if err := a.whole(more); err != nil {
			t.Error(err)
		}
	}
	if a.cached(digest.FromBytes(more)) || !a.cached(digest.FromBytes(pinned)) {
		t.Error("what is pinned has made room")
	}
	if err := a.store.CheckSpace(context.Background()); err == nil || !strings.Contains(err.Error(), "capacity 4194304") {
		t.Errorf("readiness says %v", err)
	}
}

// TestBusyCacheRelays: where the blob's file is still in use by a pull that failed, as a slow reader of that one keeps
// it, other readers get the blob from the origins.
func TestBusyCacheRelays(t *testing.T) {
	b := noise(13, 3<<20)
	o := newSource(t, b)
	o.allow(everything)
	url, _ := lonely(t, atOnce(), o.infos)
	a := startWith(t, Config{
		Config: role.Config{Origins: []ring.Member{{ID: "o", URL: o.URL}}}, Tracker: role.Endpoint{URL: url}, Peer: Peer{StallTimeout: config.Duration(200 * time.Millisecond)},
	})
	arrived, err := blob.Provisional(digest.FromBytes(b), int64(len(b)), "")
	if err != nil {
		t.Fatal(err)
	}
	part, err := a.store.Partial(arrived)
	if err != nil {
		t.Fatal(err)
	}
	defer part.Close()
	if err := a.whole(b); err != nil {
		t.Error(err)
	}
}

// TestArrivingThatIsPassedOn: when origins begin to pass on what they had begun to keep, since their disks are full,
// its readers go on without the pull, and nobody asks in a loop.
func TestArrivingThatIsPassedOn(t *testing.T) {
	b := noise(12, 4<<20)
	h := blob.NewPieceHasher(int64(len(b)))
	_, _ = h.Write(b) // never fails
	m, err := h.Sum(digest.FromBytes(b))
	if err != nil {
		t.Fatal(err)
	}
	first := m.PieceHash(0)
	c := newCourseWith(t, Config{}, b, []answer{serve})
	origin := c.hops[0]
	origin.mu.Lock()
	origin.arriving = func(n int) cluster.Arriving {
		if n > 1 {
			return cluster.Arriving{Origin: "o1", Passed: true}
		}
		return cluster.Arriving{Origin: "o1", Size: int64(len(b)), Hashes: first[:]}
	}
	origin.mu.Unlock()
	for range 2 {
		if err := c.whole(b); err != nil {
			t.Error(err)
		}
	}
	origin.mu.Lock()
	defer origin.mu.Unlock()
	if origin.asked > 8 {
		t.Errorf("the origin was asked %d times how far the blob is", origin.asked)
	}
}

// TestRelayOfAnotherSize: an origin that says two sizes of a blob, one to HEAD, is not believed, whatever part is read.
func TestRelayOfAnotherSize(t *testing.T) {
	b, longer := noise(10, 40_000), noise(11, 60_000)
	says := func(w http.ResponseWriter, r *http.Request, _ []byte) {
		if r.Method == http.MethodHead {
			serve(w, r, b)
			return
		}
		serve(w, r, longer)
	}
	c := newCourseWith(t, Config{Cache: Cache{Capacity: 100}}, b, []answer{says, says, says, says})
	content, err := c.relayed(t.Context(), "demo/app", c.d, registry.Range{Offset: 5})
	if err == nil {
		got, _ := io.ReadAll(content.Reader())
		t.Errorf("%d bytes were given of a blob of %d, none of them verified", len(got), len(b))
		_ = content.Close()
	}
}

// TestRelayOfWrongBytes: a relay never ends clean with other bytes than the digest's, and who sent them is asked last
// the next time.
func TestRelayOfWrongBytes(t *testing.T) {
	for _, size := range []int{40_000, 400_000} {
		b := noise(8, size)
		wrong := func(w http.ResponseWriter, r *http.Request, _ []byte) { serve(w, r, noise(9, size)) }
		c := newCourseWith(t, Config{Cache: Cache{Capacity: 100}}, b, []answer{wrong, wrong, wrong}, []answer{serve, serve, serve})
		err := c.whole(b)
		if size <= heldWhole && err != nil {
			t.Errorf("%d bytes: the second origin's were not asked for: %v", size, err)
		}
		if size > heldWhole && err == nil {
			t.Errorf("%d bytes: wrong bytes ended clean", size)
		}
		if err := c.whole(b); err != nil {
			t.Errorf("%d bytes, asked for again: %v", size, err)
		}
	}
}

// TestUpstreamsThatCantBeKept: what was public the last time that the disk could be written counts no more after a
// restart, once build-index has said that it is private: nobody gets it then while build-index is away.
func TestUpstreamsThatCantBeKept(t *testing.T) {
	if !mounts.Alone(t) {
		return
	}
	dir, raw := mounts.Small(t, 16<<20), manifestOf("registry.corp's")
	x := newIndex(t)
	x.put("registry.corp/team/app", raw)
	x.Server.Config.Handler = away(x.Server.Config.Handler, &x.away)
	says := func(mode cluster.Mode) {
		x.mu.Lock()
		defer x.mu.Unlock()
		x.upstreams = cluster.Upstreams{Upstreams: []cluster.Upstream{{Registry: "registry.corp", Modes: []cluster.RepositoryMode{{Repository: "**", Mode: mode}}}}}
	}
	life := func(what string, live func(t *testing.T, a *running)) {
		t.Run(what, func(t *testing.T) {
			t.Cleanup(http.DefaultClient.CloseIdleConnections)
			live(t, startWith(t, Config{
				Config: role.Config{Origins: []ring.Member{{ID: "o", URL: "http://127.0.0.1:1"}}}, Tracker: role.Endpoint{URL: "http://127.0.0.1:1"}, BuildIndex: role.Endpoint{URL: x.URL},
				Cache: Cache{Dir: dir + "/cache"},
			}))
		})
	}
	want := func(t *testing.T, a *running, status int) {
		t.Helper()
		for _, ref := range []string{"v1", digest.FromString(raw).String()} {
			if resp, body := ask(t, http.MethodGet, "http://"+a.Addr()+"/v2/registry.corp/team/app/manifests/"+ref); resp.StatusCode != status {
				t.Errorf("%s: %s %.60s, want %d", ref, resp.Status, body, status)
			}
		}
	}
	says(cluster.ModePublic)
	life("public", func(t *testing.T, a *running) {
		eventually(t, "it knows what is mirrored", func() bool { return a.namer.Known() })
		want(t, a, http.StatusOK)
	})
	x.away.Store(true)
	life("kept", func(t *testing.T, a *running) {
		eventually(t, "it knows what was mirrored", func() bool { return a.namer.Known() })
		want(t, a, http.StatusOK)
		says(cluster.ModeCaller)
		empty := mounts.Fill(t, dir, 0)
		x.away.Store(false)
		eventually(t, "it knows that it is private", func() bool { return a.namer.Upstreams().Private() })
		eventually(t, "what was public is forgotten", func() bool { _, err := a.store.Name(upstreamsKey); return err != nil })
		empty() // an agent ends with an error where it can't note what is on the disk
	})
	x.away.Store(true)
	life("not kept", func(t *testing.T, a *running) { want(t, a, http.StatusServiceUnavailable) })
}
