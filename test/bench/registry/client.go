package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	imageBlob      = 10 << 10
	listsPerClient = 5
	seeders        = 16
)

// client speaks to one registry as docker and crane do: HEAD, POST, PATCH and PUT for a blob, PUT for a manifest. It is
// a program of its own, not Kraken's, so that it favours nobody.
type client struct {
	base string
	http *http.Client
}

func newClient(c *contestant) *client {
	return &client{c.scheme + c.addr, &http.Client{Transport: &http.Transport{
		MaxIdleConnsPerHost: 64, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, // as crane --insecure; the cipher is the same
	}}}
}

func (c *client) close() { c.http.CloseIdleConnections() }

// do sends a request and wants one of some statuses. The answer's body was read.
func (c *client) do(ctx context.Context, method, at, contentType string, body []byte, want ...int) (*http.Response, []byte, error) {
	if strings.HasPrefix(at, "/") {
		at = c.base + at
	}
	req, err := http.NewRequestWithContext(ctx, method, at, bytes.NewReader(body))
	if err != nil {
		return nil, nil, err
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, nil, err
	}
	for _, s := range want {
		if resp.StatusCode == s {
			return resp, b, nil
		}
	}
	return nil, nil, fmt.Errorf("%s %s: %s: %.300s", method, at, resp.Status, b)
}

func (c *client) pushBlob(ctx context.Context, repo string, b []byte) (v1.Descriptor, error) {
	d := digest.FromBytes(b)
	out := v1.Descriptor{MediaType: "application/octet-stream", Digest: d, Size: int64(len(b))}
	resp, _, err := c.do(ctx, http.MethodHead, "/v2/"+repo+"/blobs/"+d.String(), "", nil, http.StatusOK, http.StatusNotFound)
	if err != nil || resp.StatusCode == http.StatusOK {
		return out, err
	}
	if resp, _, err = c.do(ctx, http.MethodPost, "/v2/"+repo+"/blobs/uploads/", "", nil, http.StatusAccepted); err != nil {
		return out, err
	}
	if resp, _, err = c.do(ctx, http.MethodPatch, resp.Header.Get("Location"), "application/octet-stream", b, http.StatusAccepted, http.StatusNoContent); err != nil {
		return out, err
	}
	at, err := url.Parse(resp.Header.Get("Location"))
	if err != nil {
		return out, err
	}
	q := at.Query()
	q.Set("digest", d.String())
	at.RawQuery = q.Encode()
	_, _, err = c.do(ctx, http.MethodPut, at.String(), "", nil, http.StatusCreated)
	return out, err
}

// pushImage pushes a config, a blob and the manifest of both by a tag, and returns the manifest.
func (c *client) pushImage(ctx context.Context, repo, tag string, i image) ([]byte, error) {
	cd, err := c.pushBlob(ctx, repo, i.config)
	if err != nil {
		return nil, err
	}
	ld, err := c.pushBlob(ctx, repo, i.blob)
	if err != nil {
		return nil, err
	}
	cd.MediaType, ld.MediaType = v1.MediaTypeImageConfig, v1.MediaTypeImageLayer
	m, err := json.Marshal(v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, Config: cd, Layers: []v1.Descriptor{ld}})
	if err != nil {
		return nil, err
	}
	return m, c.putManifest(ctx, repo, tag, m)
}

func (c *client) putManifest(ctx context.Context, repo, tag string, m []byte) error {
	_, _, err := c.do(ctx, http.MethodPut, "/v2/"+repo+"/manifests/"+tag, v1.MediaTypeImageManifest, m, http.StatusCreated)
	return err
}

// image is what one push needs, made before the clock runs.
type image struct{ config, blob []byte }

func newImages(n int) ([]image, error) {
	out := make([]image, n)
	for i := range out {
		blob := make([]byte, imageBlob)
		if _, err := rand.Read(blob); err != nil {
			return nil, err
		}
		config, err := json.Marshal(v1.Image{
			Platform: v1.Platform{Architecture: "amd64", OS: "linux"}, RootFS: v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(blob)}},
		})
		if err != nil {
			return nil, err
		}
		out[i] = image{config, blob}
	}
	return out, nil
}

// push has each client push its share of the images.
func (b *bench) push(ctx context.Context, c *contestant, repo string, images []image) error {
	cl := newClient(c)
	defer cl.close()
	return b.each(ctx, func(ctx context.Context, client int) error {
		for i := client; i < len(images); i += b.clients {
			if _, err := cl.pushImage(ctx, repo, fmt.Sprintf("v%d", i), images[i]); err != nil {
				return err
			}
		}
		return nil
	})
}

// warmUp makes the folders that a registry needs once, and the first connections between processes.
func warmUp(ctx context.Context, b *bench, c *contestant) error {
	images, err := newImages(max(1, b.images/5))
	if err != nil {
		return err
	}
	return b.push(ctx, c, "bench/warm", images)
}

func pushImages(_ context.Context, b *bench, c *contestant, run int) (func(context.Context) error, error) {
	images, err := newImages(b.images)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		return b.push(ctx, c, fmt.Sprintf("bench/push-%d-%d", b.clients, run), images)
	}, nil
}

const listRepository = "bench/tags"

// seedTags gives one manifest very many tags.
func seedTags(ctx context.Context, b *bench, c *contestant) error {
	cl := newClient(c)
	defer cl.close()
	images, err := newImages(1)
	if err != nil {
		return err
	}
	m, err := cl.pushImage(ctx, listRepository, "v0", images[0])
	if err != nil {
		return err
	}
	return b.seed(ctx, func(ctx context.Context, i int) error {
		return cl.putManifest(ctx, listRepository, fmt.Sprintf("v%d", i), m)
	})
}

// seedRepositories mounts one blob into very many repositories.
func seedRepositories(ctx context.Context, b *bench, c *contestant) error {
	cl := newClient(c)
	defer cl.close()
	d, err := cl.pushBlob(ctx, "bench/repository-0", []byte("one blob for all"))
	if err != nil {
		return err
	}
	return b.seed(ctx, func(ctx context.Context, i int) error {
		at := fmt.Sprintf("/v2/bench/repository-%d/blobs/uploads/?mount=%s&from=bench/repository-0", i, d.Digest)
		_, _, err := cl.do(ctx, http.MethodPost, at, "", nil, http.StatusCreated)
		return err
	})
}

// seed calls f for every name but the first.
func (b *bench) seed(ctx context.Context, f func(ctx context.Context, i int) error) error {
	many := &bench{options: b.options, clients: seeders}
	return many.each(ctx, func(ctx context.Context, client int) error {
		for i := client + 1; i < b.names; i += seeders {
			if err := f(ctx, i); err != nil {
				return err
			}
		}
		return nil
	})
}

func listTags(_ context.Context, b *bench, c *contestant, _ int) (func(context.Context) error, error) {
	return b.list(c, "/v2/"+listRepository+"/tags/list", "tags")
}

func listCatalog(_ context.Context, b *bench, c *contestant, _ int) (func(context.Context) error, error) {
	return b.list(c, "/v2/_catalog", "repositories")
}

// list reads all names several times, in one page.
func (b *bench) list(c *contestant, path, key string) (func(context.Context) error, error) {
	return func(ctx context.Context) error {
		cl := newClient(c)
		defer cl.close()
		return b.each(ctx, func(ctx context.Context, _ int) error {
			for range listsPerClient {
				_, text, err := cl.do(ctx, http.MethodGet, fmt.Sprintf("%s?n=%d", path, b.names), "", nil, http.StatusOK)
				if err != nil {
					return err
				}
				var page map[string]json.RawMessage
				var names []string
				if err := json.Unmarshal(text, &page); err != nil {
					return err
				}
				if err := json.Unmarshal(page[key], &names); err != nil {
					return err
				}
				if len(names) != b.names {
					return fmt.Errorf("%s lists %d names, want %d", path, len(names), b.names)
				}
			}
			return nil
		})
	}, nil
}
