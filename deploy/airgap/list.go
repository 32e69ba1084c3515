package airgap

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/origin/upstream"
	"kraken/proto/blob"
	"kraken/proto/registry"
)

// remote is an image's repository at its registry.
type remote struct {
	r    *upstream.Registry
	name string
}

func (s remote) manifest(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	m, err := s.r.Manifest(ctx, s.name, registry.Reference{Digest: d.Digest})
	if err != nil {
		return nil, err
	}
	return m.Bytes, nil
}

func (s remote) blob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	body, _, err := s.r.OpenBlob(ctx, s.name, d.Digest, 0, -1)
	return body, err
}

// listed returns the images of a list, read from their registries. Of each that digests names, that digest is taken and
// no other.
func listed(ctx context.Context, set *upstream.Set, list []string, digests map[string]digest.Digest) ([]image, error) {
	var out []image
	for _, text := range list {
		n, err := parseName(text)
		if err != nil {
			return nil, err
		}
		r, name, ok := set.For(n.repository)
		if !ok {
			return nil, fmt.Errorf("%s: its registry can't be asked", text)
		}
		d := v1.Descriptor{Digest: digests[text]}
		if d.Digest == "" {
			if digests != nil {
				return nil, fmt.Errorf("%s: the file of digests does not have it", text)
			}
			if d, err = r.Head(ctx, name, registry.Reference{Tag: n.tag}); err != nil {
				return nil, fmt.Errorf("%s: %w", text, err)
			}
		}
		out = append(out, image{text, d, remote{r, name}})
	}
	return out, nil
}

// readList returns the lines of a file; # begins a comment.
func readList(path string) (lines []string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		text, _, _ := strings.Cut(sc.Text(), "#")
		if text = strings.TrimSpace(text); text != "" {
			lines = append(lines, text)
		}
	}
	return lines, sc.Err()
}

// readDigests returns which digest each image has, of lines that have both in any order.
func readDigests(path string) (map[string]digest.Digest, error) {
	lines, err := readList(path)
	if err != nil {
		return nil, err
	}
	out := map[string]digest.Digest{}
	for i, l := range lines {
		words := strings.Fields(strings.ReplaceAll(l, "@", " "))
		if len(words) == 2 && strings.HasPrefix(words[0], "sha256:") {
			words[0], words[1] = words[1], words[0]
		}
		if len(words) != 2 {
			return nil, fmt.Errorf("%s, line %d: want an image and its digest", path, i+1)
		}
		d, err := blob.ParseDigest(words[1])
		if err != nil {
			return nil, fmt.Errorf("%s, line %d: %w", path, i+1, err)
		}
		out[words[0]] = d
	}
	return out, nil
}
