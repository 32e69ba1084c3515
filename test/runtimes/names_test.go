package runtimes

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/test/upstream"
)

// TestNamesThroughAnAgent: each runtime pulls by each kind of name without a change to it, by the agent where the
// cluster mirrors the registry, and a tag that has moved is seen once its tag_ttl is over.
func TestNamesThroughAnAgent(t *testing.T) {
	up, foreign := upstream.New(t, upstream.Options{}), upstream.New(t, upstream.Options{})
	c := mirroring(t, up, nil)
	table := newTable("a runtime pulls")
	t.Run("of", func(t *testing.T) {
		for _, k := range append(slices.Clone(kinds), docker) {
			t.Run(k.name, func(t *testing.T) {
				t.Parallel()
				repo := "names/" + slug(k.name)
				first, second := newImage(t, repo+"/1", 100_000), newImage(t, repo+"/2", 100_000)
				first.put(up, repo)
				newImage(t, repo+"/3", 100_000).put(foreign, repo)
				byDigest := "@" + digest.FromBytes(first.manifest).String()
				names := []struct {
					what, image string
					from        *upstream.Registry
				}{
					{"host:port/repository:tag", up.Host + "/" + repo + ":v1", up}, {"host:port/repository@digest", up.Host + "/" + repo + byDigest, up},
					{"docker.io/repository:tag", "docker.io/" + repo + ":v1", up}, {"a registry that is not mirrored", foreign.Host + "/" + repo + ":v1", foreign},
				}
				var r runtime
				if k.name == docker.name { // which has mirrors for Docker Hub alone
					names = names[2:3]
					r = dockerd(t, c.Agents[0].Base(), c.DockerHub(0))
				} else {
					r = k.start(t, c.Agents[0].Base(), up.Host, "docker.io", foreign.Host)
				}
				for _, n := range names {
					before := n.from.Count("manifest", repo)
					began := time.Now()
					if err := r.pull(n.image); err != nil {
						t.Errorf("%s: %v", n.what, err)
						continue
					}
					table.set(n.what, k.name, fmt.Sprintf("%s, %d GET of a manifest", since(began), n.from.Count("manifest", repo)-before))
				}
				if k.name == docker.name { // the tag_ttl of its registry is the usual minute
					return
				}
				second.put(up, repo)
				moved := names[0].image
				for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(200 * time.Millisecond) {
					if err := r.pull(moved); err != nil {
						t.Fatalf("a tag that has moved: %v", err)
					}
					if up.Count("manifest", repo+" "+digest.FromBytes(second.manifest).String()) > 0 {
						break // whoever asked for it was told of it by the tag's HEAD
					}
					if time.Now().After(deadline) {
						t.Fatal("a tag that has moved is not seen")
					}
				}
				table.set("a tag that has moved", k.name, "seen")
			})
		}
	})
	t.Log(table)
}
