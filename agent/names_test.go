package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/cluster"
	"kraken/proto/ring"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// index is a build-index that mirrors docker.io and has one manifest, by every tag of every repository that a test
// names. It notes what it is asked.
type index struct {
	*httptest.Server
	upstreams cluster.Upstreams
	away      atomic.Bool // see the function away

	mu        sync.Mutex
	manifests map[string]string // repository to manifest
	status    int               // of every manifest, where it is not 0
	asked     []string
}

func newIndex(t *testing.T) *index {
	t.Helper()
	x := &index{manifests: map[string]string{}, upstreams: cluster.Upstreams{Upstreams: []cluster.Upstream{{Registry: "docker.io"}}}}
	x.Server = httptest.NewServer(x)
	t.Cleanup(x.Close)
	return x
}

func (x *index) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if r.URL.Path == "/v2/_kraken/upstreams" {
		_ = json.NewEncoder(w).Encode(x.upstreams)
		return
	}
	if strings.Contains(r.URL.Path, "/_kraken/grant/") { // each repository has each blob
		w.WriteHeader(http.StatusNoContent)
		return
	}
	if _, d, ok := strings.Cut(r.URL.Path, "/_kraken/layers/"); ok {
		_ = json.NewEncoder(w).Encode(cluster.Layer{Digest: digest.Digest(d)})
		return
	}
	x.asked = append(x.asked, r.URL.Path)
	repo, ref, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/manifests/")
	raw, ok := x.manifests[repo]
	switch {
	case x.status != 0:
		w.WriteHeader(x.status)
		return
	case !ok || strings.HasPrefix(ref, "sha256:") && digest.FromString(raw).String() != ref:
		w.WriteHeader(http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
	w.Header().Set("Docker-Content-Digest", digest.FromString(raw).String())
	fmt.Fprint(w, raw)
}

func (x *index) questions() []string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return slices.Clone(x.asked)
}

func (x *index) put(repo, raw string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.manifests[repo] = raw
}

// startMirror starts an agent that knows what x mirrors.
func startMirror(t *testing.T, x *index, origin string) *running {
	t.Helper()
	return startMirrorWith(t, Config{}, x, origin)
}

func startMirrorWith(t *testing.T, cfg Config, x *index, origin string) *running {
	t.Helper()
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	cfg.Origins = []ring.Member{{ID: "o", URL: origin}}
	cfg.Tracker.URL, cfg.BuildIndex.URL = "http://127.0.0.1:1", x.URL
	cfg.DockerHub = transport.ServerConfig{Listen: "127.0.0.1:0"}
	a := startWith(t, cfg)
	eventually(t, "it knows what is mirrored", func() bool { return a.namer.Upstreams().Any() })
	return a
}

func ask(t *testing.T, method, url string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequest(method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Error(err)
	}
	return resp, string(b)
}

// Three ways in reach an upstream's repository, and one pushed to the cluster under the same name is never served for
// it. What is not mirrored is 404, and nobody is asked.
func TestThreeWaysIn(t *testing.T) {
	x := newIndex(t)
	own, upstream := manifestOf("pushed by somebody"), manifestOf("docker.io's")
	x.put("library/nginx", own)
	x.put("docker.io/library/nginx", upstream)
	a := startMirror(t, x, "http://127.0.0.1:1")
	main, hub := "http://"+a.Addr(), "http://"+a.DockerHubAddr()
	for _, c := range []struct {
		what, url, want string
	}{
		{"the cluster's own", main + "/v2/library/nginx/manifests/v1", own},
		{"by the cluster's name", main + "/v2/library/nginx/manifests/v1?ns=Kraken.Example", own},
		{"containerd", main + "/v2/library/nginx/manifests/v1?ns=docker.io", upstream},
		{"podman", main + "/v2/docker.io/library/nginx/manifests/v1", upstream},
		{"docker", hub + "/v2/library/nginx/manifests/v1", upstream},
		{"docker with containerd's store", hub + "/v2/library/nginx/manifests/v1?ns=docker.io", upstream},
		{"another registry", main + "/v2/library/nginx/manifests/v1?ns=quay.io", ""},
		{"another registry by path", main + "/v2/quay.io/library/nginx/manifests/v1", ""},
		{"another registry where Docker asks", hub + "/v2/library/nginx/manifests/v1?ns=quay.io", ""},
		{"the cluster's own where Docker asks", hub + "/v2/library/nginx/manifests/v1?ns=kraken.example", ""},
		{"a port makes another registry", main + "/v2/library/nginx/manifests/v1?ns=docker.io%3A5000", ""},
	} {
		before := len(x.questions())
		resp, body := ask(t, http.MethodGet, c.url)
		if c.want == "" {
			if resp.StatusCode != http.StatusNotFound || !strings.Contains(body, "NAME_UNKNOWN") || resp.Header.Get("OCI-Namespace") != "" || len(x.questions()) != before {
				t.Errorf("%s: %s %s, build-index was asked %v", c.what, resp.Status, body, x.questions()[before:])
			}
			continue
		}
		if resp.StatusCode != http.StatusOK || body != c.want {
			t.Errorf("%s: %s %s", c.what, resp.Status, body)
		}
		if ns := resp.Request.URL.Query().Get("ns"); resp.Header.Get("OCI-Namespace") != ns {
			t.Errorf("%s: OCI-Namespace %q", c.what, resp.Header.Get("OCI-Namespace"))
		}
	}
	for _, q := range []string{"docker.io", "quay.io"} {
		if resp, _ := ask(t, http.MethodGet, main+"/v2/_catalog?ns="+q); resp.StatusCode != http.StatusNotFound {
			t.Errorf("the repositories of %s: %s", q, resp.Status)
		}
	}
	if resp, _ := ask(t, http.MethodGet, hub+"/v2/"); resp.StatusCode != http.StatusOK {
		t.Errorf("GET /v2/ where Docker asks: %s", resp.Status)
	}
}

// A manifest's HEAD says its digest and length; a tag of signatures, or of referrers, of a registry that was not asked
// is 503: a runtime takes 404 for an answer, and asks nobody else. 429 never leaves an agent.
func TestAnswersOfAMirror(t *testing.T) {
	x := newIndex(t)
	raw := manifestOf("docker.io's")
	x.put("docker.io/library/nginx", raw)
	a := startMirror(t, x, "http://127.0.0.1:1")
	base := "http://" + a.Addr() + "/v2/library/nginx/manifests/"
	resp, _ := ask(t, http.MethodHead, base+"v1?ns=docker.io")
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Docker-Content-Digest") != digest.FromString(raw).String() || resp.ContentLength != int64(len(raw)) {
		t.Errorf("HEAD: %s %v", resp.Status, resp.Header)
	}
	hex := strings.Repeat("a", 64)
	for _, ref := range []string{"sha256-" + hex, "sha256-" + hex + ".sig"} {
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			if resp, _ := ask(t, method, base+ref+"?ns=quay.io"); resp.StatusCode != http.StatusServiceUnavailable {
				t.Errorf("%s %s of a registry that is not mirrored: %s", method, ref, resp.Status)
			}
		}
	}
	for _, status := range []int{http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusBadGateway} {
		x.mu.Lock()
		x.status = status
		x.mu.Unlock()
		if resp, body := ask(t, http.MethodGet, base+"v2?ns=docker.io"); resp.StatusCode != http.StatusServiceUnavailable {
			t.Errorf("build-index says %d: %s %s", status, resp.Status, body)
		}
		if resp, body := ask(t, http.MethodGet, base+"v1?ns=docker.io"); resp.StatusCode != http.StatusOK || body != raw || resp.Header.Get("Warning") == "" {
			t.Errorf("build-index says %d, and the tag is known: %s %s", status, resp.Status, body)
		}
	}
}

// A name that is not mirrored is 404 at once, also when nothing of the cluster answers: nobody is asked, and little is
// made. BenchmarkForeignName tells how long that takes.
func TestForeignNameAtOnce(t *testing.T) {
	type asker struct{}
	var asked sync.Map // what connections were tried to, by URL of who asked
	a := startWith(t, Config{
		Config: role.Config{
			Origins: []ring.Member{{ID: "o", URL: "http://127.0.0.1:1"}},
			Client: transport.ClientConfig{Dial: func(ctx context.Context, _, addr string) (net.Conn, error) {
				if by := ctx.Value(asker{}); by != nil { // else it is the agent's own question
					asked.Store(by, addr)
				}
				return nil, errors.New("nothing answers")
			}},
		}, Tracker: role.Endpoint{URL: "http://127.0.0.1:1"},
	})
	a.namer.Set(cluster.Upstreams{Upstreams: []cluster.Upstream{{Registry: "docker.io"}, {Registry: "*.corp:5000"}, {Registry: "ghcr.io"}}, Deny: []string{"*.internal"}})
	h := a.handler(a.cfg.Server, a.namer)
	get := func(url string) int {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, url, nil).WithContext(context.WithValue(t.Context(), asker{}, url)))
		return w.Code
	}
	made := testing.AllocsPerRun(1000, func() {
		url := "/v2/library/nginx/manifests/latest?ns=quay.io"
		if status := get(url); status != http.StatusNotFound {
			t.Fatalf("status %d", status)
		}
	})
	if t.Logf("%v allocations", made); made > 200 {
		t.Errorf("%v allocations", made)
	}
	asked.Range(func(url, addr any) bool {
		t.Errorf("%v is asked for %v", addr, url)
		return true
	})
	mirrored := "/v2/library/nginx/manifests/latest?ns=docker.io"
	if status := get(mirrored); status == http.StatusOK {
		t.Errorf("what nobody has is answered %d", status)
	}
	if addr, ok := asked.LoadAndDelete(mirrored); !ok {
		t.Error("nobody is asked for a name that is mirrored")
	} else {
		t.Logf("%v is asked for a name that is mirrored", addr)
	}
}

func BenchmarkForeignName(b *testing.B) {
	a := startWith(b, Config{
		Config: role.Config{Origins: []ring.Member{{ID: "o", URL: "http://127.0.0.1:1"}}}, Tracker: role.Endpoint{URL: "http://127.0.0.1:1"},
	})
	url := "http://" + a.Addr() + "/v2/library/nginx/manifests/latest?ns=quay.io"
	var took []time.Duration
	for b.Loop() {
		began := time.Now()
		resp, err := http.Get(url)
		if err != nil {
			b.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}

// Who names the registry in the path has chosen this mirror for the whole image: no manifest is given whose blobs can't
// be had. containerd goes elsewhere for each blob, and gets it.
func TestManifestOfBlobsThatCantBeHad(t *testing.T) {
	layer := []byte("a layer that the origin has")
	o := newSource(t, layer)
	x := newIndex(t)
	d := digest.FromBytes(layer)
	image := func(blobs ...digest.Digest) string {
		layers := []map[string]any{}
		for _, b := range blobs {
			layers = append(layers, map[string]any{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": b, "size": len(layer)})
		}
		raw, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "layers": layers})
		if err != nil {
			t.Fatal(err)
		}
		return string(raw)
	}
	x.put("docker.io/library/whole", image(d))
	x.put("docker.io/library/torn", image(d, digest.FromString("a layer that nobody has")))
	a := startMirror(t, x, o.URL)
	for _, c := range []struct {
		path string
		want int
	}{
		{"/v2/docker.io/library/whole/manifests/v1", 200},
		{"/v2/docker.io/library/torn/manifests/v1", 404},
		{"/v2/library/torn/manifests/v1?ns=docker.io", 200},
	} {
		if resp, body := ask(t, http.MethodGet, "http://"+a.Addr()+c.path); resp.StatusCode != c.want {
			t.Errorf("%s: %s %s", c.path, resp.Status, body)
		}
	}
	if resp, body := ask(t, http.MethodGet, "http://"+a.DockerHubAddr()+"/v2/library/torn/manifests/v1"); resp.StatusCode != 404 {
		t.Errorf("docker: %s %s", resp.Status, body)
	}
	o.Close()
	x.put("docker.io/library/unknown", image(digest.FromString("who knows")))
	if resp, body := ask(t, http.MethodGet, "http://"+a.Addr()+"/v2/docker.io/library/unknown/manifests/v1"); resp.StatusCode != 503 {
		t.Errorf("with the origin away: %s %s", resp.Status, body)
	}
}

// A body that is cut off ends by FIN, and the blob is refused for a moment: containerd then reads the rest from the
// upstream, and who has to choose one mirror chooses another. The cluster's own blobs can be had nowhere else.
func TestAfterACutBodyTheBlobIsRefused(t *testing.T) {
	layer := noise(7, 300<<10)
	d := digest.FromBytes(layer)
	var answered atomic.Pointer[chan struct{}] // closed when the client has the agent's headers: only then a body is cut
	origin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.Contains(r.URL.Path, "/blobs/") || strings.Contains(r.URL.Path, "_kraken") {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(layer)))
		w.WriteHeader(http.StatusOK)
		if r.Method == http.MethodGet {
			_, _ = w.Write(layer[:100<<10])
			_ = http.NewResponseController(w).Flush()
			select {
			case <-*answered.Load():
			case <-r.Context().Done():
			}
			panic(http.ErrAbortHandler)
		}
	}))
	t.Cleanup(origin.Close)
	origin.Config.ErrorLog = log.New(io.Discard, "", 0)
	x := newIndex(t)
	x.put("docker.io/library/nginx", fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","layers":[{"mediaType":"x","digest":%q,"size":%d}]}`, d, len(layer)))
	a := startMirror(t, x, origin.URL)
	base := "http://" + a.Addr() + "/v2/"
	get := func(url, rng string) (int, error) {
		req, err := http.NewRequest(http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if rng != "" {
			req.Header.Set("Range", rng)
		}
		headers := make(chan struct{})
		answered.Store(&headers)
		resp, err := http.DefaultClient.Do(req)
		close(headers)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		_, err = io.Copy(io.Discard, resp.Body)
		return resp.StatusCode, err
	}
	url := base + "library/nginx/blobs/" + d.String() + "?ns=docker.io"
	if status, err := get(url, "bytes=0-"); status != http.StatusPartialContent || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("%d, %v; want a body that ends early by FIN", status, err)
	}
	// A reader in chunks has chosen this mirror with the first one.
	for rng, want := range map[string]int{"bytes=0-": 503, "bytes=1000-": 206, "": 503} {
		if status, _ := get(url, rng); status != want {
			t.Errorf("right after a cut of a reader in chunks, %q: %d, want %d", rng, status, want)
		}
	}
	a.refused.DeleteAll()
	for _, own := range []bool{false, true} {
		url := base + "library/nginx/blobs/" + d.String()
		if !own {
			url += "?ns=docker.io"
		}
		if status, err := get(url, ""); status != http.StatusOK || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("own %v: %d, %v; want a body that ends early by FIN", own, status, err)
		}
		if status, _ := get(url, "bytes=1000-"); (status != http.StatusServiceUnavailable) != own {
			t.Errorf("own %v: right after a cut it is %d", own, status)
		}
	}
	if status, _ := get(base+"docker.io/library/nginx/manifests/v1", ""); status != http.StatusServiceUnavailable {
		t.Errorf("a manifest with that blob, by path: %d", status)
	}
	eventually(t, "it is served again", func() bool {
		status, _ := get(url, "")
		return status == http.StatusOK
	})
}

// A blob of which not even a first byte came is refused for a moment as well: who names the registry in the path gets
// no manifest then that would send it to that blob again, and goes on to the upstream.
func TestAfterABlobWithoutBytesItsManifestIsRefused(t *testing.T) {
	layer := noise(8, 300<<10)
	d := digest.FromBytes(layer)
	var broken atomic.Bool
	broken.Store(true)
	origin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case !strings.Contains(r.URL.Path, "/blobs/") || strings.Contains(r.URL.Path, "_kraken"):
			w.WriteHeader(http.StatusNotFound)
		case r.Method == http.MethodGet && broken.Load():
			w.WriteHeader(http.StatusServiceUnavailable)
		default:
			w.Header().Set("Content-Length", strconv.Itoa(len(layer)))
			_, _ = w.Write(layer)
		}
	}))
	t.Cleanup(origin.Close)
	x := newIndex(t)
	x.put("docker.io/library/nginx", fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","layers":[{"mediaType":"x","digest":%q,"size":%d}]}`, d, len(layer)))
	a := startMirror(t, x, origin.URL)
	manifest, blob := "http://"+a.Addr()+"/v2/docker.io/library/nginx/manifests/v1", "http://"+a.Addr()+"/v2/docker.io/library/nginx/blobs/"+d.String()
	status := func(url string) int {
		resp, _ := ask(t, http.MethodGet, url)
		return resp.StatusCode
	}
	if got := status(manifest); got != http.StatusOK {
		t.Fatalf("the manifest, whose blob is there: %d", got)
	}
	if got := status(blob); got != http.StatusServiceUnavailable {
		t.Fatalf("the blob, of which nothing comes: %d", got)
	}
	if got := status(manifest); got != http.StatusServiceUnavailable {
		t.Errorf("the manifest right after that: %d", got)
	}
	broken.Store(false)
	eventually(t, "it is served again", func() bool { return status(manifest) == http.StatusOK && status(blob) == http.StatusOK })
}
