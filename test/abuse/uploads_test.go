package abuse

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/cluster"
)

// settled waits until all blobs and names are in the bucket.
func (c *system) settled(t *testing.T) {
	t.Helper()
	if err := c.plan.Settle(t.Context(), 45*time.Second); err != nil {
		t.Fatal(err)
	}
}

// writeback is what an origin or a build-index has not written back yet.
func (p *process) writeback(t *testing.T) (s cluster.WritebackStatus) {
	t.Helper()
	a := do(t, http.DefaultClient, "GET", p.AdminURL, "/writeback", nil).want(t, http.StatusOK, "state of write-back")
	if err := json.Unmarshal(a.body, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// held is the content of every file that origins keep of a blob, and of every name record, by path, with its time: what
// an attack through the front door must not change.
func (c *system) held(t *testing.T, d digest.Digest) string {
	t.Helper()
	var out strings.Builder
	for _, o := range c.Origins {
		for _, pattern := range []string{path.Join("blobs/sha256", d.Encoded()[:2], d.Encoded(), "*"), "names/*"} {
			files, err := filepath.Glob(filepath.Join(o.state(), pattern))
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range files {
				if info, err := os.Stat(f); err == nil && info.Mode().IsRegular() && filepath.Base(f) != "access" {
					fmt.Fprintln(&out, strings.TrimPrefix(f, c.dir), info.Size(), info.ModTime())
				}
			}
		}
	}
	return out.String()
}

// uploadIDs are ids that somebody makes who knows how a proxy writes them, but not its key: with none, with an empty
// and with another signature, in both forms that there were. Each names what is to be reached at an origin in the place
// of a session.
func uploadIDs(repository, origin, target string) (ids []string) {
	e := base64.RawURLEncoding.EncodeToString
	v1 := fmt.Appendf(nil, `{"v":1,"r":%q,"s":[{"o":%q,"u":%q}]}`, repository, origin, target)
	v2 := fmt.Appendf(nil, `{"v":2,"s":[{"o":%q,"u":%q}],"r":%q}`, origin, target, repository)
	for _, b := range [][]byte{v1, v2} {
		mac := hmac.New(sha256.New, []byte(strings.Repeat("k", 32)))
		mac.Write(b)
		ids = append(ids, e(b), e(append(make([]byte, 32), b...)), e(mac.Sum(b[:0:0]))+e(b), e(append(mac.Sum(nil), b...)))
	}
	return ids
}

// TestUploadIDs: whoever may push to one repository writes ids of uploads himself, and reaches nothing at an origin
// with them: another's blob stays, its metainfo too, and name records are neither planted nor removed. With mutual TLS
// the proxy's certificate would open all of that.
func TestUploadIDs(t *testing.T) {
	t.Run("plain", func(t *testing.T) { forgeUploads(t, shared(t)) })
	t.Run("mutual TLS", func(t *testing.T) { forgeUploads(t, sharedTLS(t)) })
}

func forgeUploads(t *testing.T, c *system) {
	hc := c.client(t)
	content := random(300_000)
	d := c.metainfo(t, "victim/app", content).Digest
	push(t, hc, c.Proxy.URL, "victim/app", "v1", content)
	c.settled(t)
	held := c.held(t, d)
	if !strings.Contains(held, d.Encoded()) {
		t.Fatalf("no origin has the blob: %q", held)
	}
	record := forged("mine/blobs/uploads", "v1", []byte(`{"schemaVersion":2}`))
	line, err := json.Marshal(record)
	if err != nil {
		t.Fatal(err)
	}
	targets := []string{
		"blobs/" + d.String(), "../../blobs/" + d.String(), "../../../../victim/app/blobs/" + d.String(), "..%2f..%2fblobs%2f" + d.String(),
		"_kraken/metainfo/" + d.String(), "../../_kraken/metainfo/" + d.String(), "_kraken/names/" + cluster.NameKey(record),
		"_kraken/names/" + cluster.NameKey(record) + "?generation=9223372036854775807&signature=", "", ".", "x?digest=" + d.String(),
	}
	for _, origin := range c.Origins {
		for _, target := range targets {
			for _, id := range uploadIDs("mine", origin.ID(), target) {
				for _, method := range []string{"DELETE", "PUT", "PATCH", "GET"} {
					a := do(t, hc, method, c.Proxy.URL, "/v2/mine/blobs/uploads/"+id+"?digest="+digest.FromBytes(line).String(), line, "Content-Type", "application/octet-stream")
					if a.status != http.StatusNotFound {
						t.Fatalf("%s of an upload to %s: status %d, want 404: %.200s", method, target, a.status, a.body)
					}
				}
			}
		}
	}
	if now := c.held(t, d); now != held {
		t.Errorf("origins keep\n%s, and did\n%s", now, held)
	}
	do(t, hc, "HEAD", c.Proxy.URL, "/v2/victim/app/blobs/"+d.String(), nil).want(t, http.StatusOK, "the blob afterwards")
}

// TestOthersUploads: the id of somebody else's upload does nothing in another repository, nor does one with a character
// more, less or changed; and the upload goes on.
func TestOthersUploads(t *testing.T) {
	c := shared(t)
	hc := c.client(t)
	content := random(1000)
	a := do(t, hc, "POST", c.Proxy.URL, "/v2/theirs/app/blobs/uploads/", nil).want(t, http.StatusAccepted, "begin of an upload")
	own := a.header.Get("Location")
	id := path.Base(own)
	flip := func(i int) string {
		b := []byte(id)
		b[i] = map[bool]byte{true: 'B', false: 'A'}[b[i] == 'A']
		return string(b)
	}
	for name, at := range map[string]string{
		"another repository": "/v2/mine/blobs/uploads/" + id, "a longer repository": "/v2/theirs/app/x/blobs/uploads/" + id,
		"truncated": "/v2/theirs/app/blobs/uploads/" + id[:len(id)-1], "half": "/v2/theirs/app/blobs/uploads/" + id[:len(id)/2],
		"beheaded": "/v2/theirs/app/blobs/uploads/" + id[1:], "longer": "/v2/theirs/app/blobs/uploads/" + id + "A", "twice": "/v2/theirs/app/blobs/uploads/" + id + id,
		"padded": "/v2/theirs/app/blobs/uploads/" + id + "=", "a signature changed": "/v2/theirs/app/blobs/uploads/" + flip(3),
		"the text changed": "/v2/theirs/app/blobs/uploads/" + flip(len(id)-12), "an origin's id": "/v2/theirs/app/blobs/uploads/0b7a1d52-7b0e-4b3b-9a43-0a4d5b6c7d8e",
	} {
		for _, method := range []string{"GET", "PATCH", "PUT", "DELETE"} {
			a := do(t, hc, method, c.Proxy.URL, at+"?digest="+digest.FromBytes(content).String(), content, "Content-Type", "application/octet-stream")
			if a.status != http.StatusNotFound {
				t.Errorf("%s, %s: status %d, want 404: %.200s", name, method, a.status, a.body)
			}
		}
	}
	do(t, hc, "PUT", c.Proxy.URL, own+"?digest="+digest.FromBytes(content).String(), content, "Content-Type", "application/octet-stream").
		want(t, http.StatusCreated, "the end of the upload")
}

// TestNamesLikeRoutes: a repository may be called by words of the API, but never so that a path below it is read as
// another repository's.
func TestNamesLikeRoutes(t *testing.T) {
	c := shared(t)
	hc := c.client(t)
	for _, name := range []string{"blobs", "manifests/v1", "uploads/tags", "tags/blobs", "referrers/blobs/x", "a/uploads/blobs"} {
		content := random(1000)
		push(t, hc, c.Proxy.URL, name, "list", content)
		if _, layers := pull(t, hc, c.Agents[0].URL, name, "list"); len(layers) != 1 || !bytes.Equal(layers[0], content) {
			t.Errorf("%s: another image", name)
		}
	}
	for _, name := range []string{"mine/blobs/uploads", "blobs/uploads", "a/blobs/uploads/b", "a/tags/list", "a/_kraken", "_kraken/a"} {
		for method, at := range map[string]string{"PUT": "/manifests/v1", "POST": "/blobs/uploads/?digest=" + digest.FromString("x").String(), "GET": "/manifests/v1"} {
			a := do(t, hc, method, c.Proxy.URL, "/v2/"+name+at, []byte("x"), "Content-Type", manifestType)
			if a.status != http.StatusBadRequest && a.status != http.StatusNotFound {
				t.Errorf("%s in %s: status %d, want 400 or 404: %.200s", method, name, a.status, a.body)
			}
		}
	}
}

// TestFreeSessions: a client begins uploads and ends none. It is told to stop, the origins keep no file open for it,
// and others push.
func TestFreeSessions(t *testing.T) {
	c := start(t, options{})
	before := map[string]int{}
	for _, o := range c.Origins {
		before[o.Name] = o.descriptors(t)
	}
	greedy := from(t, "127.0.0.2")
	begun, refused := 0, 0
	for range 3000 {
		a := do(t, greedy, "POST", c.Proxy.URL, "/v2/mine/blobs/uploads/", nil)
		switch a.status {
		case http.StatusAccepted:
			if begun++; begun%5 == 0 { // with a byte in it
				do(t, greedy, "PATCH", c.Proxy.URL, a.header.Get("Location"), []byte("x"), "Content-Type", "application/octet-stream")
			}
		case http.StatusTooManyRequests:
			refused++
		default:
			t.Fatalf("session %d: status %d: %.200s", begun, a.status, a.body)
		}
		if refused > 20 {
			break
		}
	}
	if refused == 0 || begun < 100 {
		t.Errorf("%d sessions were begun and %d refused", begun, refused)
	}
	for _, o := range c.Origins {
		eventually(t, 10*time.Second, func() error {
			if now := o.descriptors(t); now > before[o.Name]+100 {
				return fmt.Errorf("%s has %d files open beside %d sessions, and had %d", o.Name, now, begun, before[o.Name])
			}
			return nil
		})
	}
	content := random(1 << 20)
	push(t, c.client(t), c.Proxy.URL, "others/app", "v1", content)
	if _, layers := pull(t, c.client(t), c.Proxy.URL, "others/app", "v1"); !bytes.Equal(layers[0], content) {
		t.Error("another image")
	}
	c.settled(t)
}

// Sources that somebody makes up at the origins don't keep others from pushing.
func TestInventedSources(t *testing.T) {
	bounds := map[string]any{"uploads": map[string]any{"sessions": 200, "sessions_per_source": 20}}
	c := start(t, options{config: map[string]map[string]any{"origin": bounds}})
	for _, o := range c.Origins {
		for i := range 300 {
			source := fmt.Sprintf("10.1.0.%d", i/20+1)
			a := do(t, c.client(t), "POST", o.URL, "/v2/mine/blobs/uploads/", nil, "Kraken-Source", source)
			if a.status != http.StatusAccepted && (a.status != http.StatusTooManyRequests || i < 200) {
				t.Fatalf("session %d, of %s: status %d: %.200s", i, source, a.status, a.body)
			}
		}
	}
	content := random(1 << 20)
	push(t, c.client(t), c.Proxy.URL, "others/app", "v1", content)
	if _, layers := pull(t, c.client(t), c.Proxy.URL, "others/app", "v1"); !bytes.Equal(layers[0], content) {
		t.Error("another image")
	}
}
