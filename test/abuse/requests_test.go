package abuse

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// answer is what came back, its body read up to 16 MiB.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// do sends one request. The path goes out as it is written, escapes and dot segments included.
func do(t *testing.T, hc *http.Client, method, base, path string, body []byte, header ...string) answer {
	t.Helper()
	a, err := try(hc, method, base, path, body, header...)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// try is do for a request that may not be answered at all. header has names and values by turns.
func try(hc *http.Client, method, base, path string, body []byte, header ...string) (answer, error) {
	req, err := http.NewRequest(method, base, bytes.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	path, req.URL.RawQuery, _ = cut(path)
	req.URL.Opaque = "//" + req.URL.Host + path
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	resp, err := hc.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	return answer{status: resp.StatusCode, header: resp.Header, body: b}, err
}

func cut(path string) (string, string, bool) {
	for i := range len(path) {
		if path[i] == '?' {
			return path[:i], path[i+1:], true
		}
	}
	return path, "", false
}

// want fails the test when the status is another.
func (a answer) want(t *testing.T, status int, what string) answer {
	t.Helper()
	if a.status != status {
		t.Fatalf("%s: status %d, want %d: %.500s", what, a.status, status, a.body)
	}
	return a
}

// pushBlob uploads a blob in one request and returns its digest.
func pushBlob(t *testing.T, hc *http.Client, base, repository string, content []byte) digest.Digest {
	t.Helper()
	d := digest.FromBytes(content)
	do(t, hc, "POST", base, "/v2/"+repository+"/blobs/uploads/?digest="+url.QueryEscape(d.String()), content,
		"Content-Type", "application/octet-stream").want(t, http.StatusCreated, "push of a blob")
	return d
}

const manifestType = "application/vnd.oci.image.manifest.v1+json"

// manifestOf is an image manifest with a config of "{}", which must be pushed, and these layers.
func manifestOf(t *testing.T, layers ...[]byte) []byte {
	t.Helper()
	type descriptor struct {
		MediaType string        `json:"mediaType"`
		Digest    digest.Digest `json:"digest"`
		Size      int           `json:"size"`
	}
	of := func(mediaType string, b []byte) descriptor {
		return descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: len(b)}
	}
	ds := []descriptor{}
	for _, l := range layers {
		ds = append(ds, of("application/vnd.oci.image.layer.v1.tar", l))
	}
	b, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": manifestType, "config": of("application/vnd.oci.image.config.v1+json", []byte("{}")), "layers": ds,
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// push pushes an image of these layers under a tag and returns its manifest.
func push(t *testing.T, hc *http.Client, base, repository, tag string, layers ...[]byte) []byte {
	t.Helper()
	for _, b := range append([][]byte{[]byte("{}")}, layers...) {
		pushBlob(t, hc, base, repository, b)
	}
	m := manifestOf(t, layers...)
	do(t, hc, "PUT", base, "/v2/"+repository+"/manifests/"+tag, m, "Content-Type", manifestType).want(t, http.StatusCreated, "push of a manifest")
	return m
}

// pull reads the image of a tag as a runtime would, every digest verified, and returns its manifest and its layers.
func pull(t *testing.T, hc *http.Client, base, repository, tag string) (manifest []byte, layers [][]byte) {
	t.Helper()
	a := do(t, hc, "GET", base, "/v2/"+repository+"/manifests/"+tag, nil, "Accept", manifestType).want(t, http.StatusOK, "pull of a manifest")
	var m struct {
		Layers []struct{ Digest digest.Digest }
	}
	if err := json.Unmarshal(a.body, &m); err != nil {
		t.Fatal(err)
	}
	if d := a.header.Get("Docker-Content-Digest"); d != digest.FromBytes(a.body).String() {
		t.Fatalf("the manifest's digest is %s, not %q as answered", digest.FromBytes(a.body), d)
	}
	for _, l := range m.Layers {
		b := do(t, hc, "GET", base, "/v2/"+repository+"/blobs/"+l.Digest.String(), nil).want(t, http.StatusOK, "pull of a layer").body
		if digest.FromBytes(b) != l.Digest {
			t.Fatalf("layer %s has other bytes: %d of them", l.Digest, len(b))
		}
		layers = append(layers, b)
	}
	return a.body, layers
}

// raw opens a connection, over TLS unless cfg is nil, sends these bytes, shuts its sending half if it is to, and reads
// until the other side closes or nothing came for patience. It returns what was read, at most 1 MiB, and whether the
// other side closed. That it closes while it is being sent to is no error: what it answered before is returned as far
// as it arrived.
func raw(t *testing.T, addr string, cfg *tls.Config, patience time.Duration, shut bool, send ...[]byte) (got []byte, closed bool) {
	t.Helper()
	conn, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		t.Error(err)
		return nil, false
	}
	defer conn.Close()
	if cfg != nil {
		cfg = cfg.Clone()
		cfg.ServerName = "localhost"
		conn = tls.Client(conn, cfg)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		buf := make([]byte, 32<<10)
		for len(got) < 1<<20 {
			conn.SetReadDeadline(time.Now().Add(patience))
			n, err := conn.Read(buf)
			got = append(got, buf[:n]...)
			if err != nil {
				var timeout net.Error
				closed = !errors.As(err, &timeout) || !timeout.Timeout()
				return
			}
		}
	}()
	for _, b := range send {
		conn.SetWriteDeadline(time.Now().Add(10 * time.Second))
		if _, err := conn.Write(b); err != nil {
			break // closed, or not read: what matters is what the other side says
		}
	}
	if half, ok := conn.(interface{ CloseWrite() error }); ok && shut {
		half.CloseWrite() // a connection that is closed by now has nothing to shut
	}
	<-read
	return got, closed
}

// statusOf is the status of a raw HTTP/1 answer, 0 when it is none.
func statusOf(got []byte) int {
	var status int
	if _, err := fmt.Sscanf(string(got[:min(len(got), 12)]), "HTTP/1.1 %d", &status); err == nil {
		return status
	}
	if _, err := fmt.Sscanf(string(got[:min(len(got), 12)]), "HTTP/1.0 %d", &status); err == nil {
		return status
	}
	return 0
}

// from is a client at another address of loopback.
func from(t *testing.T, addr string) *http.Client {
	t.Helper()
	tr := &http.Transport{DialContext: (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(addr)}}).DialContext}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: time.Minute, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}
