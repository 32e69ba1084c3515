package cluster

import (
	"bytes"
	"io"
	"net/http"
	"testing"

	scripted "kraken/test/upstream"
)

// A private upstream's image comes through the whole cluster with what a runtime shows, once, and to nobody without it:
// neither what is cached nor what is not.
func TestPrivateUpstreamThroughTheCluster(t *testing.T) {
	large, small := noise(3<<20, 11), noise(2000, 12)
	up := scripted.New(t, scripted.Options{Basic: true, User: "pod", Password: "secret", TLS: true})
	img := up.PutImage(nginx, "v1", large, small)
	c, repo := mirroring(t, 3, 2, up, map[string]any{
		"plain_http": false, "ca": up.CAFile, "modes": []any{map[string]any{"repository": "**", "mode": "caller"}},
	})
	get := func(agent int, password, path string) (int, []byte) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, c.Agents[agent].Base()+"/v2/"+repo+"/"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if password != "" {
			req.SetBasicAuth("pod", password)
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
		return resp.StatusCode, b
	}
	paths := []string{"manifests/v1", "manifests/" + img.Manifest.Digest.String(), "blobs/" + img.Config.Digest.String()}
	for _, l := range img.Layers {
		paths = append(paths, "blobs/"+l.Digest.String())
	}
	refused := func(when string) {
		t.Helper()
		for agent := range c.Agents {
			for _, path := range paths {
				for _, password := range []string{"", "wrong"} {
					if status, _ := get(agent, password, path); status != http.StatusUnauthorized && status != http.StatusForbidden {
						t.Errorf("%s: agent %d, %q, %s: %d", when, agent, password, path, status)
					}
				}
			}
		}
	}
	refused("before")
	for agent := range c.Agents {
		for i, path := range paths {
			status, b := get(agent, "secret", path)
			if status != http.StatusOK || i >= 3 && !bytes.Equal(b, [][]byte{large, small}[i-3]) {
				t.Errorf("agent %d, %s: %d, %d bytes", agent, path, status, len(b))
			}
		}
	}
	for _, l := range img.Layers {
		if all, _ := gets(up, l.Digest); all != 1 {
			t.Errorf("%s was asked for %d times", l.Digest, all)
		}
	}
	refused("after")
}
