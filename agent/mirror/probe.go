package mirror

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"runtime"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// DefaultProbe is a small image of a registry that every cluster of Kubernetes needs.
const DefaultProbe = "registry.k8s.io/pause:3.10"

// client has the patience of a runtime, and no proxy.
var client = &http.Client{Timeout: 2 * time.Minute, Transport: &http.Transport{
	DialContext:           (&net.Dialer{Timeout: 2 * time.Second}).DialContext,
	ResponseHeaderTimeout: 30 * time.Second,
}}

// manifestTypes are what a probe takes.
const manifestTypes = "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, " +
	"application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"

// Probe pulls an image through the agent as containerd does, with its registry's name in ?ns=, checks every byte, and
// says what came.
func Probe(ctx context.Context, s Settings, image string, out io.Writer) error {
	registry, repo, ref, err := splitImage(image)
	if err != nil {
		return err
	}
	began, p := time.Now(), prober{ctx: ctx, base: s.Agent + "/v2/" + repo, ns: registry}
	raw, err := p.manifest(ref)
	if err != nil {
		return fmt.Errorf("probe %s: %w", image, err)
	}
	var doc document
	if err := json.Unmarshal(raw, &doc); err != nil {
		return fmt.Errorf("probe %s: its manifest: %w", image, err)
	}
	if len(doc.Manifests) > 0 {
		chosen := doc.Manifests[0]
		for _, m := range doc.Manifests {
			if m.Platform.OS == "linux" && m.Platform.Architecture == runtime.GOARCH {
				chosen = m
			}
		}
		if raw, err = p.manifest(chosen.Digest.String()); err != nil {
			return fmt.Errorf("probe %s: %w", image, err)
		}
		doc = document{}
		if err := json.Unmarshal(raw, &doc); err != nil {
			return fmt.Errorf("probe %s: manifest %s: %w", image, chosen.Digest, err)
		}
	}
	for _, b := range append(doc.Layers, doc.Config) {
		if b.Digest == "" {
			continue
		}
		if err := p.blob(b); err != nil {
			return fmt.Errorf("probe %s: %w", image, err)
		}
	}
	_, err = fmt.Fprintf(out, "ok      %s came through the agent: %d blobs, %d bytes, %s\n", image, p.blobs, p.bytes, time.Since(began).Round(time.Millisecond))
	return err
}

type document struct {
	Config    descriptor   `json:"config"`
	Layers    []descriptor `json:"layers"`
	Manifests []descriptor `json:"manifests"`
}

type descriptor struct {
	Digest   digest.Digest `json:"digest"`
	Size     int64         `json:"size"`
	Platform struct {
		OS           string `json:"os"`
		Architecture string `json:"architecture"`
	} `json:"platform"`
}

// splitImage splits a name as runtimes do.
func splitImage(image string) (registry, repo, ref string, err error) {
	name, ref := image, "latest"
	if at := strings.IndexByte(image, '@'); at > 0 {
		name, ref = image[:at], image[at+1:]
	} else if at := strings.LastIndexByte(image, ':'); at > strings.LastIndexByte(image, '/') {
		name, ref = image[:at], image[at+1:]
	}
	registry, repo, ok := strings.Cut(name, "/")
	if !ok || !strings.ContainsAny(registry, ".:") && registry != "localhost" {
		registry, repo = "docker.io", name
	}
	if registry == "docker.io" && !strings.Contains(repo, "/") {
		repo = "library/" + repo
	}
	if repo == "" || ref == "" {
		return "", "", "", fmt.Errorf("%q is no name of an image", image)
	}
	return registry, repo, ref, nil
}

// prober pulls one image.
type prober struct {
	ctx      context.Context
	base, ns string
	blobs    int
	bytes    int64
}

func (p *prober) get(kind, ref string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(p.ctx, http.MethodGet, p.base+"/"+kind+"/"+ref+"?ns="+url.QueryEscape(p.ns), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", manifestTypes)
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 4096)) // only for the message
	said := strings.TrimSpace(string(body))
	switch resp.StatusCode {
	case http.StatusNotFound:
		return nil, fmt.Errorf("%s/%s: 404: the cluster does not mirror %s (upstreams in build-index' configuration), or that has no such image: %s", kind, ref, p.ns, said)
	case http.StatusUnauthorized:
		return nil, fmt.Errorf("%s/%s: 401: this image is for callers with credentials of %s: probe with a public one", kind, ref, p.ns)
	}
	return nil, fmt.Errorf("%s/%s: %s: %s", kind, ref, resp.Status, said)
}

// manifest returns a manifest that is what the answer says.
func (p *prober) manifest(ref string) ([]byte, error) {
	resp, err := p.get("manifests", ref)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	if err != nil {
		return nil, err
	}
	want := digest.Digest(resp.Header.Get("Docker-Content-Digest"))
	if strings.HasPrefix(ref, "sha256:") {
		want = digest.Digest(ref)
	}
	if got := digest.FromBytes(raw); want != got {
		return nil, fmt.Errorf("manifest %s: the answer has %s, not %s", ref, got, want)
	}
	return raw, nil
}

// blob reads a blob and compares its bytes.
func (p *prober) blob(d descriptor) error {
	resp, err := p.get("blobs", d.Digest.String())
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := d.Digest.Validate(); err != nil {
		return err
	}
	v := d.Digest.Verifier()
	n, err := io.Copy(v, resp.Body)
	if err != nil {
		return fmt.Errorf("blob %s: %w", d.Digest, err)
	}
	if !v.Verified() || n != d.Size {
		return fmt.Errorf("blob %s: what came is not it: %d bytes of %d", d.Digest, n, d.Size)
	}
	p.blobs, p.bytes = p.blobs+1, p.bytes+n
	return nil
}
