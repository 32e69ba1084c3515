package cluster

import (
	"bytes"
	"encoding/base64"
	"io"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/cluster"
	"kraken/proto/registry"
	scripted "kraken/test/upstream"
)

// twoRegistries returns a cluster that mirrors two, of which bad sends other bytes for each of blobs, at a rate of
// bytes a second, and how it calls a repository of each.
func twoRegistries(t *testing.T, origins, agents, rate int, blobs ...[]byte) (c *Cluster, badRepo, goodRepo string, good *scripted.Registry) {
	t.Helper()
	bad := scripted.New(t, scripted.Options{Rate: rate})
	good = scripted.New(t, scripted.Options{})
	for _, b := range blobs {
		bad.PutBlob("evil/x", b)
		good.PutBlob(nginx, b)
	}
	bad.Fail(scripted.Rule{Kind: "blob", Flip: true, FlipAt: 1000})
	var entries []any
	for _, up := range []*scripted.Registry{bad, good} {
		entries = append(entries, map[string]any{"registry": up.Host, "plain_http": true})
	}
	c = NewMirror(t, origins, agents, map[string]any{"registries": entries, "allow_addresses": []any{"127.0.0.1/32"}})
	return c, bad.Alias + "/evil/x", good.Alias + "/" + nginx, good
}

// What a registry sends for a digest is no business of who reads the digest from another one: neither while its bytes
// come, nor when they turn out to be others.
func TestRegistriesDontSpoilEachOther(t *testing.T) {
	large, small := noise(6<<20, 31), noise(200<<10, 32)
	c, badRepo, goodRepo, good := twoRegistries(t, 2, 3, 512<<10, large, small)
	read := func(agent int, b []byte) {
		t.Helper()
		began := time.Now()
		got, err := readBlob(t.Context(), c.Agents[agent], goodRepo, digest.FromBytes(b))
		if err != nil || !bytes.Equal(got, b) {
			t.Errorf("agent %d: %d of %d bytes after %s: %v", agent, len(got), len(b), time.Since(began), err)
		}
	}
	if got, err := readBlob(t.Context(), c.Agents[0], badRepo, digest.FromBytes(small)); err == nil {
		t.Fatalf("other bytes ended clean after %d", len(got))
	}
	read(0, small)
	read(1, small)

	slow, err := c.Agents[0].OpenBlob(t.Context(), badRepo, digest.FromBytes(large), registry.Whole)
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	if _, err := io.ReadFull(slow.Body, make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	read(0, large)
	read(1, large)
	read(2, large)
	for _, b := range [][]byte{large, small} {
		if all, _ := gets(good, digest.FromBytes(b)); all < 1 || all > 2 { // one of them for who reads both at one agent
			t.Errorf("the good registry was asked for a blob of %d bytes %d times", len(b), all)
		}
	}
}

// What a registry says to one caller is not said to another who asks at the same time.
func TestCallersDontSpoilEachOther(t *testing.T) {
	b := noise(300<<10, 33)
	up := scripted.New(t, scripted.Options{Basic: true, User: "pod", Password: "secret", TLS: true})
	d := up.PutBlob(nginx, b).Digest
	c, repo := mirroring(t, 1, 0, up, map[string]any{
		"plain_http": false, "ca": up.CAFile, "modes": []any{map[string]any{"repository": "**", "mode": "caller"}},
	})
	up.Fail(scripted.Rule{Kind: "blob", Times: 4, Delay: 500 * time.Millisecond})
	get := func(password string) (int, []byte) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, c.OriginURLs[0]+"/v2/"+repo+"/blobs/"+d.String(), nil)
		if err != nil {
			t.Error(err)
			return 0, nil
		}
		req.Header.Set(cluster.AuthorizationHeader, "Basic "+base64.StdEncoding.EncodeToString([]byte("pod:"+password)))
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Error(err)
			return 0, nil
		}
		defer resp.Body.Close()
		got, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Error(err)
		}
		return resp.StatusCode, got
	}
	var wg sync.WaitGroup
	for range 3 {
		for _, password := range []string{"gone", "secret"} {
			wg.Go(func() {
				status, got := get(password)
				if right := password == "secret"; right != (status == http.StatusOK) || right && !bytes.Equal(got, b) {
					t.Errorf("with password %q: %d, %d bytes", password, status, len(got))
				}
			})
		}
	}
	wg.Wait()
}
