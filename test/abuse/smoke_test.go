package abuse

import (
	"bytes"
	"crypto/rand"
	"net/http"
	"strings"
	"testing"
)

// random is n bytes that nobody has seen.
func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// TestImage is what all attacks are beside: an image goes in through the proxy and comes out of an agent, byte for
// byte, the same with mutual TLS.
func TestImage(t *testing.T) {
	check := func(t *testing.T, c *system) {
		hc := c.client(t)
		layers := [][]byte{random(10 << 10), random(3 << 20)} // one over HTTP, one from the swarm
		manifest := push(t, hc, c.Proxy.URL, "smoke/app", "v1", layers...)
		for _, a := range c.Agents {
			got, gotLayers := pull(t, hc, a.URL, "smoke/app", "v1")
			if !bytes.Equal(got, manifest) || len(gotLayers) != len(layers) {
				t.Fatalf("%s: other manifest: %s", a.Name, got)
			}
		}
		for _, p := range c.all() {
			p.alive(t)
			if p.rss(t) < 1<<20 || p.descriptors(t) < 3 || p.metric(t, "go_goroutines") < 3 {
				t.Errorf("%s: %d bytes, %d descriptors: measured wrong", p.Name, p.rss(t), p.descriptors(t))
			}
		}
	}
	t.Run("plain", func(t *testing.T) { check(t, shared(t)) })
	t.Run("mutual TLS", func(t *testing.T) {
		c := start(t, options{agents: 1, mutualTLS: true, config: map[string]map[string]any{"agent": {"peer": map[string]any{"stall_timeout": "3s"}}}})
		check(t, c)
		for _, p := range []*process{c.Origins[0], c.BuildIndex, c.Tracker} {
			if a, err := try(c.client(t), "GET", p.URL, "/v2/", nil); err == nil {
				t.Errorf("%s answers %d to somebody without a certificate", p.Name, a.status)
			}
			if _, err := try(c.clientOf(t, "agent-01"), "GET", p.URL, "/health", nil); err != nil {
				t.Errorf("%s: %v", p.Name, err)
			}
		}
	})
}

// TestInternalPaths asks the front doors for what roles say to each other: never 2xx, and nothing is changed behind
// them.
func TestInternalPaths(t *testing.T) {
	c := shared(t)
	hc := c.client(t)
	push(t, hc, c.Proxy.URL, "inside/app", "v1", random(1000))
	key := strings.Repeat("ab", 32)
	d := pushBlob(t, hc, c.Proxy.URL, "inside/app", random(2000)).String()
	paths := []string{
		"/v2/x/_kraken/names/" + key, "/v2/inside/app/_kraken/names/" + key, "/v2/_kraken/names", "/v2/_kraken/pending",
		"/v2/x/_kraken/names/" + key + "?generation=1", "/v2/x/%5fkraken/names/" + key, "/v2/x/_kraken%2fnames/" + key,
		"/v2/inside/app/_kraken/metainfo/" + d, "/v2/inside/app/_kraken/lease/" + d, "/v2/inside/app/_kraken/durable",
		"/v2/inside/app/_kraken/layers/" + d, "/v2/other/_kraken/mount/" + d + "?from=inside/app", "/v2/inside/app/_kraken/blobs/" + d,
	}
	for _, door := range append([]*process{c.Proxy}, c.Agents...) {
		for _, path := range paths {
			for _, method := range []string{"GET", "HEAD", "PUT", "POST", "PATCH", "DELETE"} {
				a := do(t, hc, method, door.URL, path, []byte("{}"), "Content-Type", "application/json")
				if a.status < 400 || a.status >= 500 {
					t.Errorf("%s: %s %s: status %d, want 4xx: %.200s", door.Name, method, path, a.status, a.body)
				}
			}
		}
	}
	do(t, hc, "HEAD", c.Proxy.URL, "/v2/inside/app/blobs/"+d, nil).want(t, http.StatusOK, "the blob is there")
	do(t, hc, "HEAD", c.Proxy.URL, "/v2/inside/app/manifests/v1", nil).want(t, http.StatusOK, "the tag is there")
}
