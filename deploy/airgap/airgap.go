// Package airgap carries images to a cluster that has no way to their registries: it reads them from OCI layouts,
// `docker save` archives or registries, and pushes them to a proxy under the names that they have there.
package airgap

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// source is where an image comes from.
type source interface {
	manifest(ctx context.Context, d v1.Descriptor) ([]byte, error)
	// blob opens a blob of so many bytes. It is closed by the caller.
	blob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error)
}

// image is one image to carry: name is as in its registry, with a tag, root its manifest or index.
type image struct {
	name string
	root v1.Descriptor
	from source
}

// name is an image's name: repository is the one inside the cluster.
type name struct{ repository, tag string }

// parseName splits docker.io/library/nginx:1.27. A name without a registry is refused: it would be the cluster's own.
func parseName(text string) (n name, err error) {
	at := strings.LastIndexByte(text, ':')
	if at <= strings.LastIndexByte(text, '/') {
		return n, fmt.Errorf("%q has no tag: want registry/repository:tag", text)
	}
	host, repo, ok := strings.Cut(text[:at], "/")
	if !ok {
		return n, fmt.Errorf("%q has no registry: want registry/repository:tag, as docker.io/library/nginx:1.27", text)
	}
	if n.repository, err = cluster.JoinUpstream(host, repo); err != nil {
		return n, fmt.Errorf("%q: want registry/repository:tag: %w", text, err)
	}
	n.tag = text[at+1:]
	return n, registry.CheckTag(n.tag)
}

// pusher pushes images to a proxy.
type pusher struct {
	to       *registry.Client
	progress *progress
	atOnce   int // blobs
}

// push carries one image: its blobs, then the manifests that refer to them, the root last, under the tag.
func (p *pusher) push(ctx context.Context, i image) error {
	n, err := parseName(i.name)
	if err != nil {
		return err
	}
	p.progress.begin(i.name)
	if err := p.tree(ctx, n, i.from, i.root, n.tag); err != nil {
		return fmt.Errorf("%s: %w", i.name, err)
	}
	p.progress.end(i.root.Digest)
	return nil
}

// tree pushes a manifest and what it refers to. Without a tag it is pushed by digest.
func (p *pusher) tree(ctx context.Context, n name, from source, d v1.Descriptor, tag string) error {
	raw, err := from.manifest(ctx, d)
	if err != nil {
		return fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	if got := digest.FromBytes(raw); got != d.Digest {
		return fmt.Errorf("manifest %s: its bytes are %s", d.Digest, got)
	}
	var doc struct {
		Config    *v1.Descriptor  `json:"config"`
		Layers    []v1.Descriptor `json:"layers"`
		Manifests []v1.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(raw, &doc); err != nil {
		return fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	for _, child := range doc.Manifests {
		if err := p.tree(ctx, n, from, child, ""); err != nil {
			return err
		}
	}
	blobs := doc.Layers
	if doc.Config != nil {
		blobs = append(blobs, *doc.Config)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(max(1, p.atOnce))
	for _, b := range blobs {
		if len(b.Data) > 0 || len(b.URLs) > 0 {
			continue
		}
		g.Go(func() error { return p.blob(gctx, n.repository, from, b) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	ref := registry.Reference{Tag: tag}
	if tag == "" {
		ref = registry.Reference{Digest: d.Digest}
	}
	media := d.MediaType
	if media == "" {
		media = registry.SniffMediaType(raw)
	}
	if _, err := p.to.PutManifest(ctx, n.repository, ref, media, raw, registry.PutOptions{}); err != nil {
		return fmt.Errorf("push manifest %s: %w", d.Digest, hint(err))
	}
	return nil
}

// blob pushes a blob that the cluster lacks.
func (p *pusher) blob(ctx context.Context, repo string, from source, d v1.Descriptor) error {
	switch _, err := p.to.StatBlob(ctx, repo, d.Digest); {
	case err == nil:
		p.progress.had(d.Size)
		return nil
	case !errors.Is(err, registry.ErrBlobUnknown):
		return fmt.Errorf("is blob %s there: %w", d.Digest, err)
	}
	body, err := from.blob(ctx, d)
	if err != nil {
		return fmt.Errorf("blob %s: %w", d.Digest, err)
	}
	defer body.Close()
	u, err := p.to.StartUpload(ctx, repo, registry.UploadOptions{Digest: d.Digest, Size: d.Size})
	if err != nil {
		return fmt.Errorf("push blob %s: %w", d.Digest, hint(err))
	}
	if _, err := p.to.CommitUpload(ctx, repo, u.ID, d.Digest, registry.Chunk{Length: d.Size, Body: p.progress.count(body)}); err != nil {
		return fmt.Errorf("push blob %s: %w", d.Digest, err)
	}
	return nil
}

// hint says what to do about a name that the cluster does not take.
func hint(err error) error {
	if errors.Is(err, registry.ErrUnsupported) {
		return fmt.Errorf("%w (in build-index' configuration, upstreams needs an entry for the registry with import: true; offline: true keeps the cluster from asking it)", err)
	}
	return err
}
