package cluster

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/registry"
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
	for _, path := range paths {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, c.ProxyURL+"/v2/"+repo+"/"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.SetBasicAuth("pod", "secret")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusUnauthorized {
			t.Errorf("a proxy, %s: %s", path, resp.Status)
		}
	}
}

// Whose digest is known is not given by another repository: neither a private upstream's blob nor the cluster's own, by
// a public repository's name or by a manifest there that names it, cached or not. A layer that is shared is.
func TestBlobsOfOthersByAPublicName(t *testing.T) {
	secret, own, base := noise(300_000, 21), noise(2000, 22), noise(3000, 23)
	up := scripted.New(t, scripted.Options{Token: true, Anonymous: true, Private: []string{"team"}, User: "pod", Password: "secret", TLS: true})
	img := up.PutImage("team/app", "v1", secret)
	up.PutImage("open/base", "v1", base)
	evil := v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: up.PutBlob("open/evil", []byte("{}")), Layers: []v1.Descriptor{img.Layers[0]}}
	evil.SchemaVersion = 2
	foreign := img.Layers[0]
	foreign.MediaType = registry.MediaTypeDockerForeignLayer
	for _, b := range [][]byte{own, base} {
		evil.Layers = append(evil.Layers, v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: digest.FromBytes(b), Size: int64(len(b))})
	}
	evil.Layers = append(evil.Layers, foreign)
	raw, err := json.Marshal(evil)
	if err != nil {
		t.Fatal(err)
	}
	up.PutManifest("open/evil", "v1", v1.MediaTypeImageManifest, raw)
	c, _ := mirroring(t, 2, 2, up, map[string]any{
		"plain_http": false, "ca": up.CAFile, "modes": []any{map[string]any{"repository": "team/**", "mode": "caller"}},
	})
	for _, b := range [][]byte{own, base} {
		if err := pushBlob(t.Context(), c.Proxy, "team/own", b); err != nil {
			t.Fatal(err)
		}
	}
	get := func(base, password, path string) int {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, base+"/v2/"+path, nil)
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
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			t.Error(err)
		}
		return resp.StatusCode
	}
	first, second := c.Agents[0].Base(), c.Agents[1].Base()
	for _, path := range []string{"manifests/v1", "blobs/" + img.Layers[0].Digest.String()} {
		if status := get(first, "secret", up.Alias+"/team/app/"+path); status != http.StatusOK {
			t.Fatalf("%s with the secret: %d", path, status)
		}
	}
	for _, repo := range []string{"open/base", "open/evil"} {
		for _, base := range []string{first, second} {
			if status := get(base, "", up.Alias+"/"+repo+"/manifests/v1"); status != http.StatusOK && status != http.StatusNotFound {
				t.Fatalf("%s: %d", repo, status)
			}
		}
	}
	for _, at := range []string{first, second, c.ProxyURL} {
		for _, repo := range []string{"open/base", "open/evil"} {
			for what, b := range map[string][]byte{"a private upstream's": secret, "the cluster's own": own} {
				if status := get(at, "", up.Alias+"/"+repo+"/blobs/"+digest.FromBytes(b).String()); status != http.StatusNotFound {
					t.Errorf("%s blob by %s at %s: %d", what, repo, at, status)
				}
			}
		}
		for repo, want := range map[string]int{"open/base": 200, "open/evil": 404} {
			if status := get(at, "", up.Alias+"/"+repo+"/blobs/"+digest.FromBytes(base).String()); status != want {
				t.Errorf("a base layer by %s at %s: %d, want %d", repo, at, status, want)
			}
		}
	}
}
