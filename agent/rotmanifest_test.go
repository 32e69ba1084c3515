package agent

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/registry"
	"kraken/proto/ring"
	"kraken/proto/role"
)

// A cached manifest whose file went bad counts as none, so that it is asked for again and never served.
func TestRottenManifestIsNotServed(t *testing.T) {
	a := startWith(t, Config{
		Config: role.Config{Origins: []ring.Member{{ID: "o", URL: "http://127.0.0.1:1"}}}, Tracker: role.Endpoint{URL: "http://127.0.0.1:1"},
	})
	raw := []byte(`{"schemaVersion":2}`)
	m := &registry.Manifest{Digest: digest.FromBytes(raw), MediaType: v1.MediaTypeImageManifest, Bytes: raw}
	if err := a.keepManifest(m); err != nil {
		t.Fatal(err)
	}
	if got := a.cachedManifest(m.Digest); !bytes.Equal(got, raw) {
		t.Fatalf("the cache has %q", got)
	}
	files, err := filepath.Glob(filepath.Join(a.cfg.Cache.Dir, "blobs", "sha256", "*", m.Digest.Encoded(), "data"))
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	if err := os.WriteFile(files[0], []byte(`{"schemaVersion":3}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := a.cachedManifest(m.Digest); got != nil {
		t.Errorf("a rotten manifest is served: %q", got)
	}
	if err := a.keepManifest(m); err != nil {
		t.Fatal(err)
	}
	if got := a.cachedManifest(m.Digest); !bytes.Equal(got, raw) {
		t.Errorf("after it was asked for again the cache has %q", got)
	}
}
