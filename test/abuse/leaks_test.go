package abuse

import (
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

// inside is what no client needs to know of a cluster.
var inside = regexp.MustCompile(`127\.0\.0\.1|localhost|\[::1\]|https?://|dial tcp|kraken-(origin|build-index|tracker|testfs)|\.sock\b|/state-process|/tmp/`)

// TestErrorsSayNoAddress: with the bucket, the origins and then build-index away, no answer of the proxy and of an
// agent has an address, a port, a URL or a path of this machine in it.
func TestErrorsSayNoAddress(t *testing.T) {
	c := start(t, options{agents: 1})
	hc := c.client(t)
	content := random(3 << 20)
	push(t, hc, c.Proxy.URL, "away/app", "v1", content)
	manifest := manifestOf(t, random(10))
	d, other := digest.FromBytes(content).String(), digest.FromString("other").String()
	begun := do(t, hc, "POST", c.Proxy.URL, "/v2/away/app/blobs/uploads/", nil).want(t, http.StatusAccepted, "begin of an upload").header.Get("Location")
	failed := 0
	ask := func(when string) {
		for _, door := range []*process{c.Proxy, c.Agents[0]} {
			for _, q := range []struct{ method, path string }{
				{"GET", "/v2/away/app/blobs/" + d}, {"HEAD", "/v2/away/app/blobs/" + d}, {"GET", "/v2/away/app/blobs/" + other}, {"DELETE", "/v2/away/app/blobs/" + d},
				{"GET", "/v2/away/app/manifests/v1"}, {"GET", "/v2/away/app/manifests/v2"}, {"GET", "/v2/away/app/manifests/" + other},
				{"PUT", "/v2/away/app/manifests/v3"}, {"DELETE", "/v2/away/app/manifests/v1"}, {"GET", "/v2/away/app/tags/list"},
				{"GET", "/v2/_catalog"}, {"GET", "/v2/away/app/referrers/" + other}, {"POST", "/v2/away/app/blobs/uploads/"},
				{"POST", "/v2/away/app/blobs/uploads/?digest=" + digest.FromBytes(manifest).String()}, {"POST", "/v2/away/app/blobs/uploads/?mount=" + other},
				{"PATCH", begun}, {"GET", begun}, {"PUT", begun + "?digest=" + digest.FromBytes(manifest).String()}, {"DELETE", begun}, {"GET", "/readiness"}, {"GET", "/health"},
			} {
				a, err := try(hc, q.method, door.URL, q.path, manifest, "Content-Type", manifestType)
				if err != nil {
					continue // an answer that was begun and cut says nothing
				}
				if a.status >= 500 {
					failed++
				}
				text := string(a.body) + fmt.Sprint(a.header)
				if a.status < 300 && !strings.HasPrefix(q.path, "/readiness") {
					text = ""
				}
				if found := inside.FindString(text); found != "" {
					t.Errorf("%s, %s %s at %s: %q in the answer: %d %.400s", when, q.method, q.path, door.Name, found, a.status, a.body)
				}
				for _, p := range append(c.all(), c.Bucket) {
					if port := p.Addr[strings.LastIndexByte(p.Addr, ':'):]; strings.Contains(text, port) {
						t.Errorf("%s, %s %s at %s: the port of %s in the answer: %d %.400s", when, q.method, q.path, door.Name, p.Name, a.status, a.body)
					}
				}
			}
		}
	}
	c.Bucket.kill(t)
	ask("bucket away")
	for _, o := range c.Origins {
		o.kill(t)
	}
	ask("origins away")
	c.Tracker.kill(t)
	c.BuildIndex.kill(t)
	ask("all away")
	if failed < 20 {
		t.Errorf("only %d answers were failures: the test asked for too little", failed)
	}
}
