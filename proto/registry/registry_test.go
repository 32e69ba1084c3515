package registry

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestOCINames(t *testing.T) {
	for name, ok := range map[string]bool{
		"a": true, "library/alpine": true, "a/b/c/d": true, "a.b_c__d---e/f": true, "0": true, strings.Repeat("a", 255): true,
		"": false, "/a": false, "a/": false, "a//b": false, "A": false, "a..b": false, "a___b": false, "-a": false, "a/../b": false,
		"a b": false, "a:b": false, strings.Repeat("a", 256): false,
		"blobs/uploads": false, "a/blobs/uploads": false, "a/blobs/uploads/b": false, "tags/list": false, "a/tags/list": false, "a/_kraken": false,
		"blobs": true, "a/manifests/b": true, "uploads/blobs": true, "referrers/tags": true, "a/xblobs/uploads": true, "a/tags/lists": true,
	} {
		if err := CheckName(name); (err == nil) != ok || (err != nil && !errors.Is(err, ErrNameInvalid)) {
			t.Errorf("CheckName(%q) = %v", name, err)
		}
	}
	hex64 := strings.Repeat("0a", 32)
	for ref, ok := range map[string]bool{
		"latest": true, "v1.2.3_x-y": true, "_x": true, "sha256:" + hex64: true, strings.Repeat("t", 128): true,
		"": false, ".x": false, "-x": false, "a/b": false, "sha256:" + hex64[1:]: false, strings.Repeat("t", 129): false, "md5:00": false,
	} {
		if _, err := ParseReference(ref); (err == nil) != ok {
			t.Errorf("ParseReference(%q) = %v", ref, err)
		}
	}
}

func TestOCIRoutes(t *testing.T) {
	for path, want := range map[string]route{
		"":                               {},
		"_catalog":                       {kind: "catalog"},
		"a/tags/list":                    {kind: "tags", repo: "a"},
		"tags/list/tags/list":            {kind: "tags", repo: "tags/list"}, // and the name is refused
		"a/b/manifests/v1":               {"manifest", "a/b", "v1"},
		"a/manifests/manifests/v1":       {"manifest", "a/manifests", "v1"},
		"a/blobs/sha256:00":              {"blob", "a", "sha256:00"},
		"a/blobs/uploads/":               {"uploads", "a", ""},
		"a/blobs/uploads":                {"uploads", "a", ""},
		"a/blobs/uploads/id":             {"upload", "a", "id"},
		"blobs/uploads/blobs/uploads/id": {"upload", "blobs/uploads", "id"},
		"a/referrers/sha256:00":          {"referrers", "a", "sha256:00"},
		"a/b/_kraken/lease/sha256:00":    {"extension", "a/b", "_kraken/lease/sha256:00"},
		"_kraken/names":                  {"extension", "", "_kraken/names"},
	} {
		if got, ok := parseRoute(path); !ok || got != want {
			t.Errorf("parseRoute(%q) = %+v, %v, want %+v", path, got, ok, want)
		}
	}
	for _, path := range []string{"a", "a/b", "a/unknown/b", "_kraken/", "a/_kraken/", "a/_kraken/blobs/", "a/_kraken//x", "a/_kraken/blobs/x/y"} {
		if got, ok := parseRoute(path); ok {
			t.Errorf("parseRoute(%q) = %+v, want none", path, got)
		}
	}
}

func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"0-99", "bytes 0-99/*", "bytes=5-6/7", "-", "9-3", "18446744073709551616-1", "bytes=0-9223372036854775807", "0-9223372036854775807"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if first, last, err := parseContentRange(s); err == nil && (first < 0 || last < first) {
			t.Errorf("parseContentRange(%q) = %d, %d", s, first, last)
		}
		if r := rangeHint(s); r.Offset < 0 || (r.Length < 1 && r.Length != -1) {
			t.Errorf("rangeHint(%q) = %+v", s, r)
		}
	})
}

func FuzzReference(f *testing.F) {
	f.Add("latest")
	f.Add("sha256:" + strings.Repeat("0", 64))
	f.Fuzz(func(t *testing.T, s string) {
		if r, err := ParseReference(s); err == nil && r.String() != s {
			t.Errorf("ParseReference(%q) = %+v", s, r)
		}
	})
}

// TestScripts runs testdata/*.txt. A script is requests and what must come back:
//
//	> METHOD path            a request; {name} is a captured value
//	> Header: value
//	> | body
//	< status                 what must come back
//	< Header: value          a value may be {name}, which captures it, or * for any
//	< ! Header               must not be there
//	< | text                 the body contains it
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			m := newMemory()
			s := m.server()
			s.Namer = onlyName("kraken.example")
			if strings.Contains(file, "readonly") {
				s = Server{Blobs: m, Manifests: m, Tags: m, Catalog: m, Namer: s.Namer, ReadOnly: "push to the proxy"}
			}
			srv := httptest.NewServer(s.Handler())
			defer srv.Close()
			runScript(t, file, srv.URL)
		})
	}
}

func runScript(t *testing.T, file, base string) {
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	vars := map[string]string{"digest-of-hello": digest.FromString("hello").String(), "digest-of-nothing": digest.FromString("nobody has this").String()}
	expand := func(s string) string {
		for k, v := range vars {
			s = strings.ReplaceAll(s, "{"+k+"}", v)
		}
		return s
	}
	var req *http.Request
	var body strings.Builder
	var resp *http.Response
	var got string
	send := func() {
		if body.Len() > 0 {
			req.Body, req.ContentLength = io.NopCloser(strings.NewReader(body.String())), int64(body.Len())
		}
		if resp, err = http.DefaultTransport.RoundTrip(req); err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		got, req = string(b), nil
		body.Reset()
	}
	sc := bufio.NewScanner(f)
	for n := 1; sc.Scan(); n++ {
		mark, rest, _ := strings.Cut(sc.Text(), " ")
		rest = expand(rest)
		fail := func(format string, args ...any) {
			t.Errorf("%s:%d: %s: %s\n(status %s, headers %v, body %.300s)", file, n, sc.Text(), fmt.Sprintf(format, args...), resp.Status, resp.Header, got)
		}
		switch mark {
		case ">":
			if text, ok := strings.CutPrefix(rest, "| "); ok {
				body.WriteString(text)
			} else if k, v, ok := strings.Cut(rest, ": "); ok && req != nil {
				req.Header.Add(k, v)
			} else {
				method, path, _ := strings.Cut(rest, " ")
				if req, err = http.NewRequest(method, base+path, nil); err != nil {
					t.Fatal(err)
				}
			}
		case "<":
			if req != nil {
				send()
			}
			if text, ok := strings.CutPrefix(rest, "| "); ok {
				if !strings.Contains(got, text) {
					fail("the body lacks it")
				}
			} else if k, ok := strings.CutPrefix(rest, "! "); ok {
				if resp.Header.Get(k) != "" {
					fail("it is there")
				}
			} else if k, v, ok := strings.Cut(rest, ": "); ok {
				have := resp.Header.Get(k)
				if name, ok := strings.CutPrefix(v, "{"); ok {
					vars[strings.TrimSuffix(name, "}")] = have
				} else if have == "" || (v != "*" && v != have) {
					fail("got %q", have)
				}
			} else if fmt.Sprint(resp.StatusCode) != rest {
				fail("other status")
			}
		}
	}
}

func pair(t *testing.T) (*memory, *Client) {
	t.Helper()
	m := newMemory()
	srv := httptest.NewServer(m.server().Handler())
	t.Cleanup(srv.Close)
	c, err := NewClientWith(srv.URL, srv.Client(), ClientOptions{Dialect: dialect()})
	if err != nil {
		t.Fatal(err)
	}
	return m, c
}

func TestClientSpeaksToServer(t *testing.T) {
	_, c := pair(t)
	ctx, repo := t.Context(), "demo/app"
	b := bytes.Repeat([]byte("0123456789"), 10_000)
	d := digest.FromBytes(b)
	u, err := c.StartUpload(ctx, repo, UploadOptions{Size: int64(len(b)), Digest: d})
	if err != nil {
		t.Fatal(err)
	}
	if u, err = c.WriteUpload(ctx, repo, u.ID, Chunk{0, 1, bytes.NewReader(b[:1])}); err != nil || u.Offset != 1 {
		t.Fatalf("one byte: %+v, %v", u, err)
	}
	var re *RangeError
	if _, err := c.WriteUpload(ctx, repo, u.ID, Chunk{7, 1, bytes.NewReader(b[7:8])}); !errors.As(err, &re) || re.Upload.Offset != 1 || re.Got != 7 {
		t.Errorf("gap: %v", err)
	}
	if _, err := c.CommitUpload(ctx, repo, u.ID, d, Chunk{1, int64(len(b) - 1), bytes.NewReader(b[1:])}); err != nil {
		t.Fatal(err)
	}
	if desc, err := c.StatBlob(ctx, repo, d); err != nil || desc.Size != int64(len(b)) {
		t.Errorf("stat %+v, %v", desc, err)
	}
	for _, r := range []Range{Whole, {5, 10}, {50_000, -1}} {
		body, err := c.OpenBlob(ctx, repo, d, r)
		if err != nil {
			t.Fatal(err)
		}
		if body.Size != int64(len(b)) {
			t.Errorf("range %+v: size %d", r, body.Size)
		}
		if _, err := body.Body.Seek(r.Offset, io.SeekStart); err != nil {
			t.Error(err)
		}
		if got, err := io.ReadAll(body.Body); err != nil || !bytes.Equal(got, b[r.Offset:]) {
			t.Errorf("range %+v: %d bytes, %v", r, len(got), err)
		}
		if err := body.Close(); err != nil {
			t.Error(err)
		}
		if _, err := body.Body.Read(make([]byte, 1)); err == nil {
			t.Error("a closed body still reads")
		}
	}
	raw := []byte(`{"schemaVersion":2}`)
	res, err := c.PutManifest(ctx, repo, Reference{Tag: "v1"}, v1.MediaTypeImageManifest, raw, PutOptions{})
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.GetManifest(ctx, repo, Reference{Tag: "v1"}, GetOptions{})
	if err != nil || !bytes.Equal(got.Bytes, raw) || got.MediaType != v1.MediaTypeImageManifest || got.Digest != res.Digest {
		t.Errorf("manifest %+v, %v", got, err)
	}
	if got, err := c.GetManifest(ctx, repo, Reference{Tag: "v1"}, GetOptions{Have: res.Digest}); err != nil || got.Bytes != nil {
		t.Errorf("unchanged manifest %+v, %v", got, err)
	}
	if l, err := c.ListTags(ctx, repo, Page{N: -1}); err != nil || len(l.Names) != 1 || l.More {
		t.Errorf("tags %+v, %v", l, err)
	}
	p, err := c.ListReferrers(ctx, repo, res.Digest, "x/y", "")
	if err != nil || len(p.Descriptors) != 1 || !p.Filtered || p.Next != "more" {
		t.Errorf("referrers %+v, %v", p, err)
	}
	if _, err := c.MountBlob(ctx, "demo/other", repo, d); err != nil {
		t.Error(err)
	}
	if _, err := c.MountBlob(ctx, "demo/other", repo, digest.FromString("none")); !errors.Is(err, ErrBlobUnknown) {
		t.Errorf("mount of nothing: %v", err)
	}
}

// TestServerWithoutRanges: one that answers 200 to a request for a range gives the bytes that were asked for all the
// same, by one request.
func TestServerWithoutRanges(t *testing.T) {
	b := make([]byte, 100_000)
	for i := range b {
		b[i] = byte(i / 256)
	}
	for name, tc := range map[string]struct {
		off  int64
		sent int // of the body; less than all is a broken answer
	}{
		"from the start": {0, len(b)},
		"midway":         {60_000, len(b)},
		"the last byte":  {int64(len(b) - 1), len(b)},
		"cut before":     {60_000, 50_000},
		"cut after":      {60_000, 70_000},
	} {
		t.Run(name, func(t *testing.T) {
			var asked atomic.Int32
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				asked.Add(1)
				w.Header().Set("Content-Length", strconv.Itoa(len(b)))
				w.Write(b[:tc.sent])
			}))
			defer srv.Close()
			c, err := NewClient(srv.URL, srv.Client())
			if err != nil {
				t.Fatal(err)
			}
			body, err := c.OpenBlob(t.Context(), "a", digest.FromBytes(b), Range{tc.off, -1})
			if err != nil {
				t.Fatal(err)
			}
			defer body.Close()
			if _, err := body.Body.Seek(tc.off, io.SeekStart); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(body.Body)
			if whole := tc.sent == len(b); whole != (err == nil) || !errors.Is(err, io.ErrUnexpectedEOF) && !whole {
				t.Errorf("ended with %v", err)
			}
			if want := b[min(int(tc.off), tc.sent):tc.sent]; !bytes.Equal(got, want) {
				t.Errorf("%d other bytes, want %d", len(got), len(want))
			}
			if n := asked.Load(); n != 1 {
				t.Errorf("%d requests, want 1", n)
			}
		})
	}
}

// TestServerSendsMoreThanItSaid: what follows the last byte that was announced is not handed on, so that a size that
// was found small enough holds, and is an error.
func TestServerSendsMoreThanItSaid(t *testing.T) {
	for name, first := range map[string]int64{"from the start": 0, "midway": 4} {
		t.Run(name, func(t *testing.T) {
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-9/10", first))
				w.WriteHeader(http.StatusPartialContent)
				http.NewResponseController(w).Flush() // so that it has no length
				w.Write([]byte("0123456789 and much more")[first:])
			}))
			defer srv.Close()
			c, err := NewClient(srv.URL, srv.Client())
			if err != nil {
				t.Fatal(err)
			}
			body, err := c.OpenBlob(t.Context(), "a", digest.FromString("0123456789"), Range{first, -1})
			if err != nil {
				t.Fatal(err)
			}
			defer body.Close()
			if _, err := body.Body.Seek(first, io.SeekStart); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(body.Body); !errors.Is(err, ErrUnavailable) || string(got) != "0123456789"[first:] {
				t.Errorf("read %q, %v, want %q and ErrUnavailable", got, err, "0123456789"[first:])
			}
		})
	}
}

// TestRangeRefused: a server that has the bytes and refuses the range fails at once; one that does not have them has
// none to read.
func TestRangeRefused(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Range", "bytes */100")
		WriteError(w, r, ErrRangeNotSatisfiable)
	}))
	defer srv.Close()
	c, err := NewClient(srv.URL, srv.Client())
	if err != nil {
		t.Fatal(err)
	}
	d := digest.FromString("x")
	if _, err := c.OpenBlob(t.Context(), "a", d, Range{99, -1}); !errors.Is(err, ErrUnavailable) {
		t.Errorf("byte 99 of 100: %v, want ErrUnavailable", err)
	}
	body, err := c.OpenBlob(t.Context(), "a", d, Range{100, -1})
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	if body.Size != 100 {
		t.Errorf("size %d, want 100", body.Size)
	}
}

// Bytes that are not what was asked for, or not what the answer says they are, are never handed on as the manifest.
func TestWrongManifestIsRefused(t *testing.T) {
	raw := []byte(`{"schemaVersion":2}`)
	right, other := digest.FromBytes(raw), digest.FromString("other")
	for name, c := range map[string]struct {
		ref    Reference
		have   digest.Digest
		status int
		says   string // Docker-Content-Digest
		want   digest.Digest
	}{
		"by digest":                     {Reference{Digest: right}, "", http.StatusOK, "", right},
		"by a digest of another kind":   {Reference{Digest: digest.SHA512.FromBytes(raw)}, "", http.StatusOK, "", digest.SHA512.FromBytes(raw)},
		"by digest, other bytes":        {Reference{Digest: other}, "", http.StatusOK, other.String(), ""},
		"by tag":                        {Reference{Tag: "v"}, "", http.StatusOK, right.String(), right},
		"by tag, said by nobody":        {Reference{Tag: "v"}, "", http.StatusOK, "", right},
		"by tag, other bytes":           {Reference{Tag: "v"}, "", http.StatusOK, other.String(), ""},
		"unchanged":                     {Reference{Tag: "v"}, right, http.StatusNotModified, "", right},
		"unchanged, but nothing was":    {Reference{Tag: "v"}, "", http.StatusNotModified, right.String(), ""},
		"unchanged, but of another one": {Reference{Digest: other}, right, http.StatusNotModified, "", ""},
	} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if c.says != "" {
				w.Header().Set("Docker-Content-Digest", c.says)
			}
			w.WriteHeader(c.status)
			if c.status == http.StatusOK {
				w.Write(raw)
			}
		}))
		cl, err := NewClient(srv.URL, srv.Client())
		if err != nil {
			t.Fatal(err)
		}
		m, err := cl.GetManifest(t.Context(), "demo/app", c.ref, GetOptions{Have: c.have})
		switch {
		case c.want == "" && !errors.Is(err, ErrUnavailable):
			t.Errorf("%s: %+v, %v, want ErrUnavailable", name, m, err)
		case c.want != "" && (err != nil || m.Digest != c.want):
			t.Errorf("%s: %+v, %v", name, m, err)
		}
		srv.Close()
	}
}

// TestErrorsCrossTheWire: errors.Is holds on the other side for every line of the table.
func TestErrorsCrossTheWire(t *testing.T) {
	for _, want := range table {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			WriteError(w, r, fmt.Errorf("%w: the reason", want))
		}))
		c, err := NewClient(srv.URL, srv.Client())
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.ListTags(t.Context(), "demo/app", Page{N: -1})
		if !errors.Is(err, want) && !(want == ErrRangeInvalid && errors.Is(err, ErrRangeInvalid)) {
			t.Errorf("%s %d came back as %v", want.Code, want.Status, err)
		}
		if want != ErrInternal && want != ErrRangeInvalid && !strings.Contains(fmt.Sprint(err), "the reason") {
			t.Errorf("%s: the reason was lost: %v", want.Code, err)
		}
		if want.Status < 500 && strings.Contains(fmt.Sprint(err), srv.URL) {
			t.Errorf("%s: the caller's mistake is told with where this registry asked: %v", want.Code, err)
		}
		srv.Close()
	}
}

func TestUnreachableIsNotMissing(t *testing.T) {
	m, c := pair(t)
	m.down = true
	d := digest.FromString("x")
	_, err := c.OpenBlob(t.Context(), "demo/app", d, Whole)
	var retry *RetryError
	if !errors.Is(err, ErrUnavailable) || errors.Is(err, ErrBlobUnknown) || !errors.As(err, &retry) {
		t.Errorf("503: %v, want ErrUnavailable with a time to retry", err)
	}
	gone, err := NewClient("http://127.0.0.1:1", http.DefaultClient)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := gone.StatBlob(t.Context(), "demo/app", d); !errors.Is(err, ErrUnavailable) {
		t.Errorf("refused: %v, want ErrUnavailable", err)
	}
}

// cut is a blob that breaks off.
type cut struct{ *bytes.Reader }

func (c cut) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	if err == io.EOF {
		err = errors.New("swarm is gone")
	}
	return n, err
}

type broken struct{ *memory }

func (broken) OpenBlob(_ context.Context, _ string, d digest.Digest, _ Range) (*Content, error) {
	return &Content{Digest: d, Size: 1 << 20, Body: longer{cut{bytes.NewReader(make([]byte, 1000))}}, Close: func() error { return nil }}, nil
}

// longer claims to have more bytes than come.
type longer struct{ cut }

func (l longer) Seek(off int64, whence int) (int64, error) {
	if whence == io.SeekEnd {
		return 1 << 20, nil
	}
	return l.cut.Seek(off, whence)
}

func TestBrokenBodyNeverEndsClean(t *testing.T) {
	srv := httptest.NewServer(Server{Blobs: broken{newMemory()}}.Handler())
	defer srv.Close()
	c, err := NewClient(srv.URL, srv.Client())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	body, err := c.OpenBlob(ctx, "a", digest.FromString("x"), Whole)
	if err != nil {
		return // cut before the headers: as good
	}
	defer body.Close()
	if n, err := io.Copy(io.Discard, body.Body); err == nil {
		t.Errorf("%d bytes and a clean end", n)
	}
}

// fileSink is a connection that takes files as they are, as net/http's does for sendfile.
type fileSink struct {
	*httptest.ResponseRecorder
	files int
}

func (s *fileSink) ReadFrom(r io.Reader) (int64, error) {
	if l, ok := r.(*io.LimitedReader); ok {
		if _, ok := l.R.(*os.File); ok {
			s.files++
		}
	}
	return io.Copy(s.Body, r)
}

func TestFilesReachTheConnectionAsFiles(t *testing.T) {
	name := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(name, []byte("hello"), 0o600); err != nil {
		t.Fatal(err)
	}
	for header, want := range map[string]string{"": "hello", "bytes=1-2": "el"} {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		if header != "" {
			r.Header.Set("Range", header)
		}
		w := &fileSink{ResponseRecorder: httptest.NewRecorder()}
		err = ServeContent(w, r, &Content{Digest: digest.FromString("hello"), Size: 5, File: f, Close: f.Close})
		if err != nil || w.files != 1 || w.Body.String() != want {
			t.Errorf("Range %q: %q, %d files, %v, want %q as one file", header, w.Body, w.files, err, want)
		}
	}
}

// onlyName is a Namer of a registry that has one name and repositories of its own.
type onlyName string

func (n onlyName) Repository(namespace, path string) (string, error) {
	if namespace != "" && !strings.EqualFold(namespace, string(n)) {
		return "", fmt.Errorf("%w: this is no mirror of %.100q", ErrNameUnknown, namespace)
	}
	return path, nil
}
