package agent

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/config"
	"kraken/proto/ring"
	"kraken/proto/role"
)

// A cached file that somebody removes or changes under the running agent is fetched again by the next who asks, small
// or from the swarm.
func TestLostFileIsFetchedAgain(t *testing.T) {
	for name, harm := range map[string]func(folder string) error{
		"folder removed": os.RemoveAll,
		"file removed":   func(f string) error { return os.Remove(filepath.Join(f, "data")) },
		"shortened":      func(f string) error { return os.Truncate(filepath.Join(f, "data"), 100) },
	} {
		for _, size := range []int{3000, 3 << 20} {
			t.Run(name, func(t *testing.T) {
				b := noise(1, size)
				d := digest.FromBytes(b)
				o := newSource(t, b)
				o.allow(everything)
				url, _ := lonely(t, atOnce(), o.infos)
				a := start(t, o, url)
				if err := a.whole(b); err != nil {
					t.Fatal(err)
				}
				eventually(t, "the blob is cached", func() bool { return a.cached(d) })
				if err := harm(filepath.Join(a.cfg.Cache.Dir, "blobs", "sha256", d.Encoded()[:2], d.Encoded())); err != nil {
					t.Fatal(err)
				}
				if err := a.whole(b); err != nil {
					t.Error(err)
				}
				eventually(t, "the blob is cached again", func() bool { return a.cached(d) })
				if err := a.whole(b); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// A blob that nobody reads any more makes room for the next, however lately it came.
func TestIdleBlobMakesRoom(t *testing.T) {
	const capacity = 10 << 20
	first, second := noise(1, capacity*6/10), noise(2, capacity*6/10)
	o := newSource(t, first, second)
	o.allow(everything)
	url, _ := lonely(t, atOnce(), o.infos)
	a := startWith(t, Config{
		Config: role.Config{Origins: []ring.Member{{ID: "o", URL: o.URL}}}, Tracker: role.Endpoint{URL: url},
		Peer: Peer{StallTimeout: config.Duration(time.Minute)}, Cache: Cache{Capacity: capacity},
	})
	for _, b := range [][]byte{first, second, first} {
		if err := a.whole(b); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the blob is cached", func() bool { return a.cached(digest.FromBytes(b)) })
		eventually(t, "the pull has ended", func() bool { return a.pulling() == 0 })
	}
	a.noErrors()
}
