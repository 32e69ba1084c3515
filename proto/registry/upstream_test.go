package registry

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// other is a registry of somebody else: it answers by a script, and remembers what it was asked.
type other struct {
	*httptest.Server
	mu    sync.Mutex
	asked []*http.Request
	sent  []string // bodies
}

func newOther(t *testing.T, h func(o *other, w http.ResponseWriter, r *http.Request)) *other {
	t.Helper()
	o := &other{}
	o.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		o.mu.Lock()
		o.asked, o.sent = append(o.asked, r), append(o.sent, string(b))
		o.mu.Unlock()
		h(o, w, r)
	}))
	t.Cleanup(o.Close)
	return o
}

func plainClient(t *testing.T, url string, o ClientOptions) *Client {
	t.Helper()
	tr := &http.Transport{}
	t.Cleanup(tr.CloseIdleConnections)
	c, err := NewClientWith(url, &http.Client{Transport: tr}, o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func readAll(t *testing.T, c *Client, d digest.Digest, r Range) ([]byte, error) {
	t.Helper()
	body, err := c.OpenBlob(t.Context(), "demo/app", d, r)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	if _, err := body.Body.Seek(r.Offset, io.SeekStart); err != nil {
		return nil, err
	}
	return io.ReadAll(body.Body)
}

// A plain client sends nothing that is not of the specification, whatever it is asked to do.
func TestPlainClientHasNoHeaderOfOurs(t *testing.T) {
	o := newOther(t, func(_ *other, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) })
	c, err := NewClient(o.URL, o.Client())
	if err != nil {
		t.Fatal(err)
	}
	d := digest.FromString("x")
	for _, m := range clientCalls() {
		if err := m.do(t, c, "demo/app", d.String()); err == nil {
			t.Error("418 is no error")
		}
	}
	_, err = c.StartUpload(t.Context(), "demo/app", UploadOptions{Digest: d, Size: 7, Source: "192.0.2.1"})
	_, werr := c.WriteUpload(t.Context(), "demo/app", "id", Chunk{5, -1, strings.NewReader("x")})
	if err == nil || werr == nil {
		t.Error("418 is no error")
	}
	for _, r := range o.asked {
		for name := range r.Header {
			if strings.HasPrefix(name, "Kraken-") {
				t.Errorf("%s %s has %s", r.Method, r.URL, name)
			}
		}
	}
	if len(o.asked) < 15 {
		t.Errorf("only %d requests", len(o.asked))
	}
}

// Redirects of reads are followed to other hosts, which are told nothing of who asks.
func TestRedirects(t *testing.T) {
	b := []byte("0123456789")
	d := digest.FromBytes(b)
	store := newOther(t, func(_ *other, w http.ResponseWriter, r *http.Request) {
		if r.URL.RawQuery != "signature=a%2Fb&x=1" {
			t.Errorf("the query became %q", r.URL.RawQuery)
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
	})
	var to string
	front := newOther(t, func(o *other, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Location", to)
		if strings.HasPrefix(to, "again") {
			w.Header().Set("Location", o.URL+r.URL.Path)
		}
		w.WriteHeader(http.StatusTemporaryRedirect)
	})
	o := ClientOptions{Elsewhere: 3, Dialect: Dialect{Decorate: func(r *http.Request) {
		r.Header.Set("Authorization", "Bearer secret")
		r.Header.Set("Kraken-Peer", "peer")
	}}}
	c := plainClient(t, front.URL, o)
	to = store.URL + "/store/x?signature=a%2Fb&x=1"
	if got, err := readAll(t, c, d, Range{4, 3}); err != nil || string(got) != "456789" {
		t.Errorf("read %q, %v", got, err)
	}
	if desc, err := c.StatBlob(t.Context(), "demo/app", d); err != nil || desc.Size != 10 {
		t.Errorf("stat %+v, %v", desc, err)
	}
	for _, r := range store.asked {
		if r.Header.Get("Authorization") != "" || r.Header.Get("Kraken-Peer") != "" {
			t.Errorf("the other host is told %v", r.Header)
		}
	}
	if h := front.asked[0].Header; h.Get("Authorization") == "" || h.Get("Kraken-Peer") == "" || store.asked[0].Header.Get("Range") != "bytes=4-6" {
		t.Errorf("the registry is told %v, the other host %v", h, store.asked[0].Header)
	}
	for _, bad := range []string{"again and again", "file:///etc/passwd", "gopher://x/", "http://user@" + store.Listener.Addr().String() + "/", "http:///x", "%zz"} {
		to = bad
		if got, err := readAll(t, c, d, Whole); !errors.Is(err, ErrUnavailable) {
			t.Errorf("to %s: %q, %v", bad, got, err)
		}
	}
	o.Elsewhere, to = 0, store.URL+"/store/x?signature=a%2Fb&x=1"
	before := len(store.asked)
	if _, err := readAll(t, plainClient(t, front.URL, o), d, Whole); err == nil || len(store.asked) != before {
		t.Errorf("a client that stays followed a redirect: %v", err)
	}
	if err := mayLeave(parsed(t, "https://a/"), parsed(t, "http://a/")); err == nil {
		t.Error("from https to http")
	}
}

// Locations of uploads are where they say: relative or absolute, with a query, at another host; and a Range may be
// missing.
func TestUploadLocations(t *testing.T) {
	b := []byte("0123456789")
	d := digest.FromBytes(b)
	elsewhere := newOther(t, func(o *other, w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			w.WriteHeader(http.StatusCreated)
			return
		}
		w.Header().Set("Location", "?state=2")
		w.WriteHeader(http.StatusAccepted)
	})
	for name, location := range map[string]string{
		"a path":                   "/v2/demo/app/blobs/uploads/some-id",
		"a path and a query":       "/v2/demo/app/blobs/uploads/some-id?_state=a%2Fb%3D",
		"relative":                 "some-id?_state=x",
		"absolute":                 "{base}/v2/demo/app/blobs/uploads/some-id?_state=x&y",
		"of another path":          "/uploads/some~id/here",
		"an id like ours":          "/v2/demo/app/blobs/uploads/u_c29tZXRoaW5n",
		"of another host":          "{elsewhere}/bucket?upload=1",
		"an id that is no plain 1": "/v2/demo/app/blobs/uploads/some=id",
	} {
		t.Run(name, func(t *testing.T) {
			front := newOther(t, func(o *other, w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodPut {
					w.WriteHeader(http.StatusCreated)
					return
				}
				w.Header().Set("Location", strings.NewReplacer("{base}", o.URL, "{elsewhere}", elsewhere.URL).Replace(location))
				w.WriteHeader(http.StatusAccepted)
			})
			elsewhere.asked, elsewhere.sent = nil, nil
			c := plainClient(t, front.URL, ClientOptions{Elsewhere: 1, Dialect: Dialect{Decorate: func(r *http.Request) { r.Header.Set("Authorization", "secret") }}})
			u, err := c.StartUpload(t.Context(), "demo/app", UploadOptions{Size: -1})
			if err != nil || u.Offset != 0 || strings.Trim(u.ID, idLetters) != "" {
				t.Fatalf("%+v, %v", u, err)
			}
			if u, err = c.WriteUpload(t.Context(), "demo/app", u.ID, Chunk{0, 4, bytes.NewReader(b[:4])}); err != nil || u.Offset != 4 {
				t.Fatalf("%+v, %v", u, err)
			}
			desc, err := c.CommitUpload(t.Context(), "demo/app", u.ID, d, Chunk{4, 6, bytes.NewReader(b[4:])})
			if err != nil || desc.Size != 10 {
				t.Fatalf("%+v, %v", desc, err)
			}
			at := front
			if name == "of another host" {
				at = elsewhere
			}
			last := at.asked[len(at.asked)-1]
			if last.URL.Query().Get("digest") != d.String() || at.sent[len(at.sent)-1] != "456789" || strings.Contains(location, "_state") && last.URL.Query().Get("_state") == "" {
				t.Errorf("the last request is %s %s, %q", last.Method, last.URL, at.sent[len(at.sent)-1])
			}
			if at == elsewhere && last.Header.Get("Authorization") != "" {
				t.Error("another host is shown credentials")
			}
			// Nobody else can make an id that leads where he wants.
			if strings.HasPrefix(u.ID, sealed) {
				if _, err := plainClient(t, front.URL, ClientOptions{Elsewhere: 1}).UploadStatus(t.Context(), "demo/app", u.ID); !errors.Is(err, ErrBlobUploadUnknown) {
					t.Errorf("another client's id: %v", err)
				}
				if _, err := c.UploadStatus(t.Context(), "demo/other", u.ID); !errors.Is(err, ErrBlobUploadUnknown) {
					t.Errorf("in another repository: %v", err)
				}
			}
		})
	}
}

// Errors are told apart without the specification's JSON, and a 401 says what the registry wants.
func TestErrorsOfOthers(t *testing.T) {
	d := digest.FromString("x")
	for name, c := range map[string]struct {
		status int
		header string
		body   string
		do     func(t *testing.T, c *Client) error
		want   *Error
	}{
		"a page for a blob": {404, "", "<html>not found</html>", func(t *testing.T, c *Client) error { return ignore(c.OpenBlob(t.Context(), "a", d, Whole)) }, ErrBlobUnknown},
		"a page for a manifest": {404, "", "<html>not found</html>", func(t *testing.T, c *Client) error {
			return ignore(c.GetManifest(t.Context(), "a", Reference{Tag: "v"}, GetOptions{}))
		}, ErrManifestUnknown},
		"a page for tags":      {404, "", "", func(t *testing.T, c *Client) error { return ignore(c.ListTags(t.Context(), "a", Page{N: -1})) }, ErrNameUnknown},
		"a page for a session": {404, "", "", func(t *testing.T, c *Client) error { return ignore(c.UploadStatus(t.Context(), "a", "x")) }, ErrBlobUploadUnknown},
		"a gateway":            {502, "", "<html>", func(t *testing.T, c *Client) error { return c.Ping(t.Context()) }, ErrUnavailable},
		"JSON of another kind": {403, "", `{"errors":"no"}`, func(t *testing.T, c *Client) error { return c.Ping(t.Context()) }, ErrDenied},
		"too many":             {429, "", "slow down", func(t *testing.T, c *Client) error { return c.Ping(t.Context()) }, ErrTooManyRequests},
		"who are you":          {401, `Bearer realm="https://auth.example/token",service="r",scope="repository:a:pull,push", Basic realm=x`, "", func(t *testing.T, c *Client) error { return c.Ping(t.Context()) }, ErrUnauthorized},
	} {
		o := newOther(t, func(_ *other, w http.ResponseWriter, _ *http.Request) {
			if c.header != "" {
				w.Header().Set("WWW-Authenticate", c.header)
			}
			w.WriteHeader(c.status)
			io.WriteString(w, c.body)
		})
		err := c.do(t, plainClient(t, o.URL, ClientOptions{Elsewhere: 1}))
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if c.want != ErrUnauthorized {
			continue
		}
		want := []Challenge{
			{"bearer", map[string]string{"realm": "https://auth.example/token", "service": "r", "scope": "repository:a:pull,push"}},
			{"basic", map[string]string{"realm": "x"}},
		}
		var who *UnauthorizedError
		if !errors.As(err, &who) || !reflect.DeepEqual(who.Challenges, want) {
			t.Errorf("%s: %+v", name, who)
		}
	}
}

// Pages are linked in whatever form RFC 8288 has; a digest that is not said is computed.
func TestPagesAndDigestsOfOthers(t *testing.T) {
	for link, next := range map[string]string{
		`</v2/a/tags/list?last=v2&n=2>; rel="next"`:                             "",
		`<https://elsewhere.example/v2/a/tags/list?n=2&last=token>; rel=next`:   "token",
		`<?last=v2>; title="x"; rel="prev next", </x>; rel="first"`:             "",
		`</first>; rel="first", </v2/a/tags/list?last=other%2Fone>; rel="next"`: "other/one",
		`</first>; rel="first"`: "none",
		``:                      "none",
		`<`:                     "none",
	} {
		o := newOther(t, func(_ *other, w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Link", link)
			io.WriteString(w, `{"name":"a","tags":["v1","v2"]}`)
		})
		l, err := plainClient(t, o.URL, ClientOptions{Elsewhere: 1}).ListTags(t.Context(), "a", Page{N: 2})
		if err != nil || l.More != (next != "none") || l.More && l.Next != next {
			t.Errorf("%s: %+v, %v", link, l, err)
		}
	}
	raw := []byte("{}")
	o := newOther(t, func(_ *other, w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			w.WriteHeader(http.StatusCreated)
			return
		}
		w.Write(raw)
	})
	c := plainClient(t, o.URL, ClientOptions{Elsewhere: 1})
	if res, err := c.PutManifest(t.Context(), "a", Reference{Tag: "v"}, "a/b", raw, PutOptions{}); err != nil || res.Digest != digest.FromBytes(raw) {
		t.Errorf("%+v, %v", res, err)
	}
	if m, err := c.GetManifest(t.Context(), "a", Reference{Tag: "v"}, GetOptions{}); err != nil || m.Digest != digest.FromBytes(raw) {
		t.Errorf("%+v, %v", m, err)
	}
}

// A body ends where the registry said, or it is an error.
func TestLengthsOfOthers(t *testing.T) {
	b := []byte("0123456789")
	for name, c := range map[string]struct {
		answer func(w http.ResponseWriter, r *http.Request)
		ok     bool
	}{
		"a length": {func(w http.ResponseWriter, _ *http.Request) { w.Write(b) }, true},
		"none, but for HEAD": {func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodHead {
				w.Header().Set("Content-Length", "10")
				return
			}
			http.NewResponseController(w).Flush()
			w.Write(b)
		}, true},
		"none at all": {func(w http.ResponseWriter, _ *http.Request) { http.NewResponseController(w).Flush(); w.Write(b) }, false},
		"cut":         {func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Length", "11"); w.Write(b) }, false},
		"another range": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Range", "bytes 0-8/10")
			w.WriteHeader(206)
			w.Write(b)
		}, false},
		"longer than for HEAD": {func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodHead {
				w.Header().Set("Content-Length", "9")
				return
			}
			http.NewResponseController(w).Flush()
			w.Write(b)
		}, false},
		"shorter than for HEAD": {func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodHead {
				w.Header().Set("Content-Length", "11")
				return
			}
			http.NewResponseController(w).Flush()
			w.Write(b)
		}, false},
	} {
		o := newOther(t, func(_ *other, w http.ResponseWriter, r *http.Request) { c.answer(w, r) })
		got, err := readAll(t, plainClient(t, o.URL, ClientOptions{Elsewhere: 1}), digest.FromBytes(b), Whole)
		if c.ok != (err == nil) || c.ok && !bytes.Equal(got, b) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

// Debian's docker-registry is spoken to as any registry is.
func TestDockerRegistry(t *testing.T) {
	program, err := exec.LookPath("docker-registry")
	if err != nil {
		if os.Getenv("KRAKEN_TEST_REQUIRE") == "1" {
			t.Fatal("docker-registry is not installed: test/setup.sh gcc does it")
		}
		t.Skip("docker-registry is not installed")
	}
	dir := t.TempDir()
	cfg := fmt.Sprintf("version: 0.1\nstorage: {filesystem: {rootdirectory: %q}, delete: {enabled: true}}\nhttp: {addr: \"127.0.0.1:0\"}\n", filepath.Join(dir, "state"))
	if err := os.WriteFile(filepath.Join(dir, "config.yml"), []byte(cfg), 0o600); err != nil {
		t.Fatal(err)
	}
	said, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer said.Close()
	cmd := exec.Command(program, "serve", filepath.Join(dir, "config.yml"))
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	listening, addr := regexp.MustCompile(`listening on (127\.0\.0\.1:\d+)\D`), ""
	for began := time.Now(); addr == ""; time.Sleep(20 * time.Millisecond) {
		text, err := os.ReadFile(said.Name())
		if err != nil {
			t.Fatal(err)
		}
		if m := listening.FindSubmatch(text); m != nil {
			addr = string(m[1])
		} else if time.Since(began) > 20*time.Second {
			t.Fatalf("it does not say where it listens:\n%s", text)
		}
	}
	ctx, repo := t.Context(), "demo/app"
	c := plainClient(t, "http://"+addr, ClientOptions{Elsewhere: maxRedirects})
	if err := c.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	b := bytes.Repeat([]byte("0123456789"), 10_000)
	d := digest.FromBytes(b)
	u, err := c.StartUpload(ctx, repo, UploadOptions{Size: -1})
	if err != nil {
		t.Fatal(err)
	}
	if u, err = c.WriteUpload(ctx, repo, u.ID, Chunk{0, 1, bytes.NewReader(b[:1])}); err != nil || u.Offset != 1 {
		t.Fatalf("one byte: %+v, %v", u, err)
	}
	if u, err = c.WriteUpload(ctx, repo, u.ID, Chunk{-1, -1, bytes.NewReader(b[1:5000])}); err != nil || u.Offset != 5000 {
		t.Fatalf("a chunk of unknown length: %+v, %v", u, err)
	}
	if u, err = c.UploadStatus(ctx, repo, u.ID); err != nil || u.Offset != 5000 {
		t.Fatalf("status: %+v, %v", u, err)
	}
	if desc, err := c.CommitUpload(ctx, repo, u.ID, d, Chunk{5000, int64(len(b) - 5000), bytes.NewReader(b[5000:])}); err != nil || desc.Size != int64(len(b)) {
		t.Fatal(desc, err)
	}
	for _, r := range []Range{Whole, {5, 10}, {99_999, -1}} {
		if got, err := readAll(t, c, d, r); err != nil || !bytes.Equal(got, b[r.Offset:]) {
			t.Errorf("%+v: %d bytes, %v", r, len(got), err)
		}
	}
	if _, err := c.MountBlob(ctx, "demo/other", repo, d); err != nil {
		t.Error(err)
	}
	if _, err := c.MountBlob(ctx, "demo/other", repo, digest.FromString("none")); !errors.Is(err, ErrBlobUnknown) {
		t.Errorf("mount of nothing: %v", err)
	}
	if _, err := c.StatBlob(ctx, repo, digest.FromString("none")); !errors.Is(err, ErrBlobUnknown) {
		t.Errorf("a blob that is not there: %v", err)
	}
	raw := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"a/b","digest":%q,"size":%d},"layers":[]}`, v1.MediaTypeImageManifest, d, len(b))
	for _, tag := range []string{"v1", "v2", "v3"} {
		if res, err := c.PutManifest(ctx, repo, Reference{Tag: tag}, v1.MediaTypeImageManifest, raw, PutOptions{}); err != nil || res.Digest != digest.FromBytes(raw) {
			t.Fatal(res, err)
		}
	}
	if m, err := c.GetManifest(ctx, repo, Reference{Tag: "v2"}, GetOptions{}); err != nil || !bytes.Equal(m.Bytes, raw) {
		t.Errorf("%+v, %v", m, err)
	}
	if _, err := c.GetManifest(ctx, repo, Reference{Tag: "none"}, GetOptions{}); !errors.Is(err, ErrManifestUnknown) {
		t.Errorf("a tag that is not there: %v", err)
	}
	if l, err := c.ListTags(ctx, repo, Page{N: -1}); err != nil || len(l.Names) != 3 {
		t.Errorf("tags %+v, %v", l, err)
	}
	if l, err := c.ListRepositories(ctx, Page{N: 1}); err != nil || len(l.Names) != 1 || !l.More {
		t.Errorf("repositories %+v, %v", l, err)
	}
	if err := c.DeleteManifest(ctx, repo, Reference{Digest: digest.FromBytes(raw)}); err != nil {
		t.Error(err)
	}
	if err := c.DeleteBlob(ctx, repo, d); err != nil {
		t.Error(err)
	}
}

func parsed(t *testing.T, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}
