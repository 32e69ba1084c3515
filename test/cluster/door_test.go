package cluster

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// forgedIDs are upload ids that a client writes itself: one for each origin, with target where a session's id should
// be.
func forgedIDs(version int, repo, target string) (ids []string) {
	for i := range 3 {
		b := fmt.Appendf(nil, `{"v":%d,"s":[{"o":"origin-%02d","u":%q}],"r":%q}`, version, i+1, target, repo)
		ids = append(ids, base64.RawURLEncoding.EncodeToString(b))
		// with room for a signature
		ids = append(ids, base64.RawURLEncoding.EncodeToString(append(make([]byte, 32), b...)))
	}
	return ids
}

// send makes a raw request and returns its status.
func send(t *testing.T, method, url string, body []byte) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

// Whoever may push to one repository must not reach an origin's other routes through the id of an upload.
func TestUploadIDNamesASessionAndNothingElse(t *testing.T) {
	c := New(t, 0)
	b := noise(300_000, 1)
	d := digest.FromBytes(b)
	if err := pushBlob(t.Context(), c.Proxy, "victim", b); err != nil {
		t.Fatal(err)
	}
	writtenBack(t, c)
	var origins []*cluster.OriginClient
	for _, u := range c.OriginURLs {
		origins = append(origins, &cluster.OriginClient{Client: c.client(u)})
	}
	copies := func() (n int) {
		for _, o := range origins {
			if _, err := o.LocalStat(t.Context(), "victim", d); err == nil {
				n++
			}
		}
		return n
	}
	metainfos := func() (times []time.Time) {
		for i := range origins {
			name := filepath.Join(c.StateDir(fmt.Sprintf("origin-%02d", i+1)), "blobs/sha256", d.Encoded()[:2], d.Encoded(), "metainfo")
			if fi, err := os.Stat(name); err == nil {
				times = append(times, fi.ModTime())
			}
		}
		return times
	}
	uploads := c.ProxyURL + "/v2/mine/blobs/uploads/"
	before := copies()
	made := metainfos()
	for _, version := range []int{1, 2} {
		for _, id := range forgedIDs(version, "mine", "_kraken/metainfo/"+d.String()) {
			if status := send(t, http.MethodDelete, uploads+id, nil); status != http.StatusNotFound {
				t.Errorf("DELETE of a forged id: status %d, want 404", status)
			}
		}
		rec := cluster.NameRecord{Version: 1, Kind: "manifest", Repository: "mine/blobs/uploads", Tag: "v1", Digest: d, Bytes: []byte("x"), Generation: 1 << 62}
		raw, err := json.Marshal(rec)
		if err != nil {
			t.Fatal(err)
		}
		for _, id := range forgedIDs(version, "mine", "_kraken/names/"+cluster.NameKey(rec)) {
			send(t, http.MethodPut, uploads+id+"?digest="+d.String(), raw)
		}
		for _, id := range forgedIDs(version, "mine", "blobs/"+d.String()) {
			send(t, http.MethodDelete, uploads+id, nil)
		}
	}
	if now := copies(); before == 0 || now != before {
		t.Errorf("another repository's blob is on %d origins, and was on %d", now, before)
	}
	if now := metainfos(); fmt.Sprint(now) != fmt.Sprint(made) {
		t.Errorf("the metainfo was made again: %v, before %v", now, made)
	}
	for i, o := range origins {
		if err := o.Names(t.Context(), func(line []byte) error { return fmt.Errorf("%.300s", line) }); err != nil {
			t.Errorf("origin %d keeps a record that a client wrote: %v", i+1, err)
		}
	}
}

// The front door has none of the roles' own routes, under whatever name.
func TestProxyOffersNoExtension(t *testing.T) {
	c := New(t, 0)
	d := digest.FromString("x").String()
	for _, path := range []string{
		"_kraken/names", "_kraken/pending", "x/_kraken/blobs/" + d, "x/_kraken/metainfo/" + d, "x/_kraken/names/" + strings.Repeat("0", 64), "x/_kraken/layers/" + d,
		"x/blobs/uploads/_kraken%2Fnames", "x/blobs/uploads/..%2F..%2F_kraken/names", "x/blobs/uploads/blobs%2F" + d,
	} {
		for _, method := range []string{http.MethodGet, http.MethodPut, http.MethodDelete, http.MethodPost} {
			if status := send(t, method, c.ProxyURL+"/v2/"+path, nil); status < 400 || status >= 500 {
				t.Errorf("%s /v2/%s: status %d", method, path, status)
			}
		}
	}
}

// One client that begins uploads and never ends them is told to stop; names are pushed all the same, by that client,
// too.
func TestSessionsOfOneClientAreBounded(t *testing.T) {
	c := New(t, 0)
	raw, _ := image(t, c.Proxy, "demo/app", "v1", noise(1000, 1))
	refused := false
	for range 1000 {
		_, err := c.Proxy.StartUpload(t.Context(), "mine", registry.UploadOptions{Size: -1})
		if err == nil {
			continue
		}
		if refused = errors.Is(err, registry.ErrTooManyRequests) && strings.Contains(err.Error(), "sessions already"); !refused {
			t.Fatalf("one more session: %v, want ErrTooManyRequests with words", err)
		}
		break
	}
	if !refused {
		t.Error("1,000 sessions of one client were begun")
	}
	for _, p := range []*registry.Client{c.Proxy, c.OtherProxy} {
		if _, err := p.PutManifest(t.Context(), "demo/app", registry.Reference{Tag: "v2"}, v1.MediaTypeImageManifest, raw, registry.PutOptions{}); err != nil {
			t.Errorf("a name: %v", err)
		}
	}
	wantManifest(t, c.OtherProxy, "demo/app", "v2", raw)
}
