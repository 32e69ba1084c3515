package registry

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"mime"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
)

// countingBody counts the bytes that a handler writes to its connection.
type countingBody struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (w countingBody) Write(b []byte) (int, error) {
	n, err := w.ResponseWriter.Write(b)
	w.n.Add(int64(n))
	return n, err
}

// behind is a proxy: a server over a client of an origin with one blob. What the origin was asked for and wrote is
// counted.
func behind(t *testing.T, b []byte) (url string, requests, written *atomic.Int64) {
	t.Helper()
	m := newMemory()
	m.put("a", b, digest.FromBytes(b))
	requests, written = new(atomic.Int64), new(atomic.Int64)
	h := m.server().Handler()
	origin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		h.ServeHTTP(countingBody{w, written}, r)
	}))
	t.Cleanup(origin.Close)
	c, err := NewClient(origin.URL, origin.Client())
	if err != nil {
		t.Fatal(err)
	}
	proxy := httptest.NewServer(Server{Blobs: c}.Handler())
	t.Cleanup(proxy.Close)
	return proxy.URL + "/v2/a/blobs/" + digest.FromBytes(b).String(), requests, written
}

// The ranges of one request cost an origin what they have, not the rest of the blob each, and not a request each.
func TestRangesCostWhatTheyHave(t *testing.T) {
	b := make([]byte, 16<<20)
	rand.NewChaCha8([32]byte{1}).Read(b)
	at := func(n, step, length int) string {
		var rs []string
		for i := range n {
			rs = append(rs, fmt.Sprintf("%d-%d", i*step, i*step+length-1))
		}
		return "bytes=" + strings.Join(rs, ",")
	}
	for name, c := range map[string]struct {
		header             string
		status             int
		requests, writtenK int64
	}{
		"1,000 small ones":       {at(1000, 16<<10, 1), 200, 1, 16 << 10},
		"33":                     {at(33, 100, 1), 200, 1, 16 << 10},
		"three that overlap":     {"bytes=0-99,50-149,60-69", 200, 1, 16 << 10},
		"two that overlap":       {"bytes=0-99,50-149", 206, 2, 1},
		"the same three times":   {"bytes=5-5,5-5,5-5", 200, 1, 16 << 10},
		"the same twice":         {"bytes=5-5,5-5", 206, 2, 1},
		"32 with small gaps":     {at(32, 32<<10, 100), 206, 1, 1024},
		"32 far from each other": {at(32, 500<<10, 100), 206, 32, 4},
		"one":                    {"bytes=1000-1999", 206, 1, 1},
		"backwards":              {"bytes=9000000-9000009,5000-5009", 206, 2, 1},
		"at both ends":           {"bytes=0-9,-10", 206, 2, 1},
	} {
		t.Run(name, func(t *testing.T) {
			url, requests, written := behind(t, b)
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Range", c.header)
			resp, err := http.DefaultTransport.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if resp.StatusCode != c.status {
				t.Errorf("status %d, want %d", resp.StatusCode, c.status)
			}
			wantParts(t, resp, b)
			if n := requests.Load(); n > c.requests {
				t.Errorf("%d requests to the origin, want %d", n, c.requests)
			}
			if n := written.Load(); n > c.writtenK<<10 {
				t.Errorf("the origin wrote %d bytes, want %d KiB at most", n, c.writtenK)
			}
		})
	}
}

// wantParts compares each part of an answer with what its Content-Range says of b.
func wantParts(t *testing.T, resp *http.Response, b []byte) {
	t.Helper()
	part := func(h string, r io.Reader) {
		first, last := int64(0), int64(len(b)-1)
		if h != "" {
			var err error
			if first, last, _, err = parseResponseRange(h); err != nil {
				t.Error(err)
				return
			}
		}
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, b[first:last+1]) {
			t.Errorf("part %q: %d bytes, %v", h, len(got), err)
		}
	}
	mt, params, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err != nil || mt != "multipart/byteranges" {
		part(resp.Header.Get("Content-Range"), resp.Body)
		return
	}
	mr := multipart.NewReader(resp.Body, params["boundary"])
	for {
		p, err := mr.NextPart()
		if err == io.EOF {
			return
		}
		if err != nil {
			t.Error(err)
			return
		}
		part(p.Header.Get("Content-Range"), p)
	}
}

// What is asked for ahead lies within the blob, and has what will be read.
func FuzzRanges(f *testing.F) {
	for _, s := range []string{"bytes=0-0,2-,-1", "bytes=", "bytes=0-9223372036854775807", "bytes=5-5,5-5", "bytes= 1 - 2 , ,3-4", "bytes=-0", "bytes=--1", "bytes=-"} {
		f.Add(s, int64(100))
	}
	f.Fuzz(func(t *testing.T, header string, size int64) {
		if size < 0 {
			return
		}
		rs, ok := parseRanges(header)
		if !ok {
			return
		}
		plan := resolve(rs, size)
		for _, r := range plan {
			if r.Offset < 0 || r.Length < 1 || r.Offset+r.Length > size || r.Offset+r.Length < 0 {
				t.Errorf("%q of %d: %+v", header, size, r)
			}
			if got := run(plan, r.Offset); overlaps(plan) == 0 && (got.Offset != r.Offset || got.Length < r.Length || got.Offset+got.Length > size) {
				t.Errorf("%q of %d: %+v is read by %+v", header, size, r, got)
			}
		}
	})
}
