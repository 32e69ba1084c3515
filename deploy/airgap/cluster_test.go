package airgap

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"kraken/test/cluster"
)

// An image that was carried to a cluster without a way to its registry is pulled from every agent by its unchanged
// name.
func TestImportedImagesArePulledByTheirNames(t *testing.T) {
	c := cluster.NewMirror(t, 2, 1, map[string]any{"offline": true, "registries": []any{map[string]any{"registry": "docker.io", "import": true}}})
	files, root := layoutFiles(t, map[string]string{containerdName: "docker.io/library/nginx:1.27"})
	at := writeTar(t, files)
	if code, out := run(t, "--to", c.ProxyURL, at); code != 0 {
		t.Fatalf("%d %s", code, out)
	}
	get := func(path string) (int, []byte) {
		resp, err := http.Get(c.Agents[0].Base() + "/v2/library/nginx/" + path + "?ns=docker.io")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Error(err)
		}
		return resp.StatusCode, b
	}
	status, raw := get("manifests/1.27")
	if status != http.StatusOK || digest.FromBytes(raw) != root {
		t.Fatalf("by tag: %d %s", status, raw)
	}
	for name, b := range files {
		if hex, ok := strings.CutPrefix(name, "blobs/sha256/"); ok && !strings.Contains(string(b), "schemaVersion") {
			if status, got := get("blobs/sha256:" + hex); status != http.StatusOK || string(got) != string(b) {
				t.Errorf("blob %s: %d %s", hex, status, got)
			}
		}
	}
	if code, out := run(t, "--to", c.ProxyURL, "--as", "quay.io/a/b:1", at); code == 0 || !strings.Contains(out, "import") {
		t.Errorf("a registry that is not marked: %d %s", code, out)
	}
}
