package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
)

// A condition that can't be understood must never turn into no condition.
func FuzzConditions(f *testing.F) {
	d := digest.FromString("hello").String()
	for _, s := range []string{`"` + d + `"`, `W/"` + d + `", "x"`, "*", `"*"`, "", ",", `"a,b"`, d} {
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, match, none string) {
		ds, _ := etags([]string{match})
		for _, d := range ds {
			if _, err := blob.ParseDigest(d.String()); err != nil {
				t.Errorf("etags(%q) has %q", match, d)
			}
		}
		r := httptest.NewRequest(http.MethodPut, "/v2/a/manifests/v1", nil)
		r.Header["If-Match"], r.Header["If-None-Match"] = []string{match}, []string{none}
		o, err := putOptions(r, Reference{Tag: "v1"})
		if err != nil {
			t.Fatal(err)
		}
		if o.IfMatch == nil && !o.IfExists {
			t.Errorf("If-Match: %q is no condition", match)
		}
		if d := parseETag(none); d != "" && !slices.Contains(o.IfNoneMatch, d) {
			t.Errorf("If-None-Match: %q is %v", none, o.IfNoneMatch)
		}
		if o.IfAbsent != slices.Contains(trimmed(none), "*") {
			t.Errorf("If-None-Match: %q: absent is %v", none, o.IfAbsent)
		}
	})
}

func trimmed(list string) []string {
	out := strings.Split(list, ",")
	for i := range out {
		out[i] = strings.TrimSpace(out[i])
	}
	return out
}

// What a page's Link says is read back as what it was made of.
func FuzzPages(f *testing.F) {
	f.Add("2", "v1", "a/b")
	f.Add("-1", `"><`, "%")
	f.Add("99999999999999999999", "a&n=3", "a b")
	f.Fuzz(func(t *testing.T, n, last, artifactType string) {
		r := httptest.NewRequest(http.MethodGet, "/v2/a/tags/list", nil)
		r.URL.RawQuery = url.Values{"n": {n}, "last": {last}}.Encode()
		p, err := page(r)
		if err != nil {
			if !errors.Is(err, ErrPaginationInvalid) {
				t.Errorf("n=%q: %v", n, err)
			}
			return
		}
		if p.N < 0 || p.N > maxPage || p.Last != last {
			t.Errorf("n=%q, last=%q: %+v", n, last, p)
		}
		w := httptest.NewRecorder()
		next(w, r, p, Names{Names: []string{last}, More: true})
		target, params, ok := strings.Cut(strings.TrimPrefix(w.Header().Get("Link"), "<"), ">")
		u, err := url.Parse(target)
		if !ok || err != nil || params != `; rel="next"` || u.Query().Get("last") != last {
			t.Errorf("last=%q: Link %q", last, w.Header().Get("Link"))
		}
	})
}

// Whatever a client sends is answered, and never as the server's fault; an error is the specification's JSON.
func FuzzHandler(f *testing.F) {
	d := digest.FromString("hello").String()
	blobs, tags := "a/blobs/"+d, "a/manifests/v1"
	for _, s := range []struct{ method, path, name, value, body string }{
		{"GET", blobs, "Range", "bytes=0-9223372036854775807", ""},
		{"GET", blobs, "Range", "bytes=0-0,2-,-1", ""},
		{"GET", blobs, "If-None-Match", "*", ""},
		{"HEAD", tags, "Accept", "*/*", ""},
		{"GET", "a/tags/list?n=1&last=v1", "", "", ""},
		{"GET", "a/referrers/" + d + "?artifactType=a%2Fb&last=x", "", "", ""},
		{"PUT", tags, "If-Match", `"x"`, `{"schemaVersion":2}`},
		{"PUT", "a/manifests/" + d + "?tag=a&tag=b", "Content-Type", "text/plain; x=", "hello"},
		{"POST", "a/blobs/uploads/?digest=" + d, "", "", "hello"},
		{"POST", "a/blobs/uploads/?mount=" + d, "Kraken-Size", "-1", ""},
		{"PATCH", "a/blobs/uploads/session-1", "Content-Range", "0-9223372036854775807", "x"},
		{"PATCH", "a/blobs/uploads/session-1", "Kraken-Offset", "-5", "x"},
		{"PUT", "a/blobs/uploads/session-1?digest=" + d, "", "", "hello"},
		{"DELETE", "a/blobs/uploads/session-1", "", "", ""},
		{"GET", "?ns=x", "Kraken-Version", "1", ""},
	} {
		f.Add(s.method, s.path, s.name, s.value, s.body)
	}
	f.Fuzz(func(t *testing.T, method, path, name, value, body string) {
		m := newMemory()
		m.put("a", []byte("hello"), digest.FromString("hello"))
		m.uploads["a session-1"] = []byte{}
		m.tags["a"] = map[string]digest.Digest{"v1": digest.FromString("{}")}
		m.contents[digest.FromString("{}")] = &Manifest{Digest: digest.FromString("{}"), MediaType: "a/b", Bytes: []byte("{}")}
		u, err := url.ParseRequestURI("/v2/" + path)
		if err != nil || method == "" {
			return // net/http answers itself
		}
		r := httptest.NewRequest(http.MethodGet, "/", strings.NewReader(body))
		r.Method, r.URL = method, u
		if name != "" {
			r.Header.Set(name, value)
		}
		w := httptest.NewRecorder()
		m.server().Handler().ServeHTTP(w, r)
		if w.Code >= 500 {
			t.Errorf("%s %s, %s: %s: status %d: %s", method, path, name, value, w.Code, w.Body)
		}
		var e errorBody
		if w.Code >= 400 && method != http.MethodHead && (json.Unmarshal(w.Body.Bytes(), &e) != nil || len(e.Errors) != 1 || e.Errors[0].Code == "") {
			t.Errorf("%s %s, %s: %s: status %d without the specification's JSON: %s", method, path, name, value, w.Code, w.Body)
		}
	})
}

// What a registry answers is read by our clients: an upstream's and a peer's mistakes must not become wrong offsets.
func FuzzAnswers(f *testing.F) {
	f.Add(416, "/v2/a/blobs/uploads/x", "0-9223372036854775807", "", "5", []byte(`{"errors":[{"code":"BLOB_UPLOAD_INVALID"}]}`))
	f.Add(404, "x", "bytes 0-3/4", "-1", "-1", []byte(`{"errors":[]}`))
	f.Add(503, "/", "bytes 0-9223372036854775806/9223372036854775807", "7", "99999999999999999999", []byte(`<html>`))
	c, err := NewClientWith("http://registry.example", http.DefaultClient, ClientOptions{Dialect: dialect(), Elsewhere: 1})
	if err != nil {
		f.Fatal(err)
	}
	asked := httptest.NewRequest(http.MethodPatch, "http://registry.example/v2/a/blobs/uploads/x", nil)
	f.Fuzz(func(t *testing.T, status int, location, rng, offset, retry string, body []byte) {
		h := http.Header{"Location": {location}, "Range": {rng}, "Kraken-Offset": {offset}, "Retry-After": {retry}}
		if u, ok := c.uploadOf(&http.Response{Header: h, Request: asked}, c.uploadPath("a", "x"), -1); ok && (u.Offset < 0 || u.ID == "" || strings.Trim(u.ID, idLetters) != "" || c.uploadPath("a", u.ID).err != nil) {
			t.Errorf("%v: %+v", h, u)
		}
		if first, last, total, err := parseResponseRange(rng); err == nil && (first < 0 || last < first || total <= last) {
			t.Errorf("Content-Range %q: %d-%d/%d", rng, first, last, total)
		}
		err := c.decodeError(&http.Response{StatusCode: status, Header: h, Request: asked, Body: io.NopCloser(bytes.NewReader(body))}, c.uploadPath("a", "x"))
		var known *Error
		if !errors.As(err, &known) {
			t.Errorf("status %d, %q: %v is none of the table", status, body, err)
		}
		var re *RetryError
		if errors.As(err, &re) && re.After < 0 {
			t.Errorf("Retry-After %q: %v", retry, re.After)
		}
	})
}

const idLetters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"

// Whatever a registry wants, reading it ends, and finds no more than there may be.
func FuzzChallenges(f *testing.F) {
	f.Add(`Bearer realm="https://auth.example/token",service="registry.example",scope="repository:a/b:pull,push"`)
	f.Add(`Basic realm="x \"y\"", Bearer realm=z`)
	f.Add(`Negotiate, , =", "`)
	f.Fuzz(func(t *testing.T, s string) {
		cs := ParseChallenges([]string{s, s})
		for _, c := range cs {
			if c.Scheme == "" || len(c.Parameters) > maxChallenges {
				t.Errorf("%q: %+v", s, c)
			}
		}
		if len(cs) > maxChallenges {
			t.Errorf("%q: %d challenges", s, len(cs))
		}
	})
}
