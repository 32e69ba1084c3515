package main

import (
	"bufio"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// layers makes images of one random layer as layouts that crane pushes as they are: it neither compresses nor hashes
// them first.
type layers struct{ dir string }

func newLayers(dir string) (*layers, error) { return &layers{dir}, os.MkdirAll(dir, 0o755) }

// fresh makes the layout of a client with a layer that no registry has seen, in the place of its last one.
func (l *layers) fresh(client int, size int64) (dir string, layer digest.Digest, err error) {
	dir = filepath.Join(l.dir, fmt.Sprintf("layout-%d", client))
	blobs := filepath.Join(dir, "blobs", "sha256")
	if err := os.RemoveAll(dir); err != nil {
		return "", "", err
	}
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		return "", "", err
	}
	f, err := os.Create(filepath.Join(blobs, "layer"))
	if err != nil {
		return "", "", err
	}
	defer f.Close()
	var seed [32]byte
	if _, err := rand.Read(seed[:]); err != nil {
		return "", "", err
	}
	h := digest.SHA256.Digester()
	w := bufio.NewWriterSize(io.MultiWriter(f, h.Hash()), 1<<20)
	if _, err := io.Copy(w, io.LimitReader(mrand.NewChaCha8(seed), size)); err != nil {
		return "", "", err
	}
	if err := w.Flush(); err != nil {
		return "", "", err
	}
	layer = h.Digest()
	if err := os.Rename(f.Name(), filepath.Join(blobs, layer.Encoded())); err != nil {
		return "", "", err
	}
	put := func(v any) (d digest.Digest, n int64, err error) {
		b, err := json.Marshal(v)
		if err != nil {
			return "", 0, err
		}
		d = digest.FromBytes(b)
		return d, int64(len(b)), os.WriteFile(filepath.Join(blobs, d.Encoded()), b, 0o644)
	}
	config, configSize, err := put(v1.Image{Platform: v1.Platform{Architecture: "amd64", OS: "linux"}, RootFS: v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{layer}}})
	if err != nil {
		return "", "", err
	}
	manifest, manifestSize, err := put(v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		Config: v1.Descriptor{MediaType: v1.MediaTypeImageConfig, Digest: config, Size: configSize},
		Layers: []v1.Descriptor{{MediaType: v1.MediaTypeImageLayerGzip, Digest: layer, Size: size}},
	})
	if err != nil {
		return "", "", err
	}
	index, err := json.Marshal(v1.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex,
		Manifests: []v1.Descriptor{{MediaType: v1.MediaTypeImageManifest, Digest: manifest, Size: manifestSize}},
	})
	if err != nil {
		return "", "", err
	}
	if err := os.WriteFile(filepath.Join(dir, "index.json"), index, 0o644); err != nil {
		return "", "", err
	}
	return dir, layer, os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)
}
