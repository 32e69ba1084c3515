package airgap

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// files is a folder, or what is in a tar archive. Of a path of a layout only names that the layout's form gives are
// opened.
type files interface {
	open(name string) (body io.ReadCloser, size int64, err error)
}

// folder is a folder on disk.
type folder string

func (f folder) open(name string) (io.ReadCloser, int64, error) {
	if !filepath.IsLocal(name) {
		return nil, 0, fmt.Errorf("%q leads out of %s", name, string(f))
	}
	file, err := os.Open(filepath.Join(string(f), name))
	if err != nil {
		return nil, 0, err
	}
	info, err := file.Stat()
	if err != nil {
		return nil, 0, errors.Join(err, file.Close())
	}
	return file, info.Size(), nil
}

// archive is a tar archive that is read at any place: it is gone through once, to find where its files are.
type archive struct {
	file *os.File
	at   map[string]section
}

type section struct{ offset, size int64 }

// openArchive goes through an archive. The caller closes its file.
func openArchive(file *os.File) (*archive, error) {
	a := &archive{file, map[string]section{}}
	links := map[string]string{}
	t := tar.NewReader(file)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("%s is no tar archive (a compressed one is unpacked first): %w", file.Name(), err)
		}
		switch name := path.Clean(h.Name); h.Typeflag {
		case tar.TypeReg:
			offset, err := file.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, err
			}
			a.at[name] = section{offset, h.Size}
		case tar.TypeSymlink: // a layer that is there twice
			links[name] = path.Join(path.Dir(name), h.Linkname)
		case tar.TypeLink:
			links[name] = path.Clean(h.Linkname)
		}
	}
	for name, to := range links {
		if s, ok := a.at[to]; ok {
			a.at[name] = s
		}
	}
	return a, nil
}

func (a *archive) open(name string) (io.ReadCloser, int64, error) {
	s, ok := a.at[path.Clean(name)]
	if !ok {
		return nil, 0, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	}
	return io.NopCloser(io.NewSectionReader(a.file, s.offset, s.size)), s.size, nil
}

// maxDocument bounds a JSON file.
const maxDocument = 64 << 20

// read returns a small file.
func read(f files, name string) ([]byte, error) {
	body, size, err := f.open(name)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	if size > maxDocument {
		return nil, fmt.Errorf("%s has %d bytes", name, size)
	}
	return io.ReadAll(io.LimitReader(body, maxDocument))
}

// layout is an OCI image layout.
type layout struct{ files }

func blobPath(d digest.Digest) (string, error) {
	if err := d.Validate(); err != nil {
		return "", err
	}
	return path.Join("blobs", d.Algorithm().String(), d.Encoded()), nil
}

func (l layout) manifest(_ context.Context, d v1.Descriptor) ([]byte, error) {
	p, err := blobPath(d.Digest)
	if err != nil {
		return nil, err
	}
	return read(l.files, p)
}

func (l layout) blob(_ context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	p, err := blobPath(d.Digest)
	if err != nil {
		return nil, err
	}
	body, size, err := l.open(p)
	if err == nil && size != d.Size {
		err = errors.Join(fmt.Errorf("it has %d bytes, and its descriptor says %d", size, d.Size), body.Close())
	}
	return body, err
}

// Annotations of index.json by which tools say an image's name. The first of these has all of it.
const containerdName = "io.containerd.image.name"

// images returns what is in a layout, each under its own name, or, where it says none, the only one under as.
func (l layout) images(as string) ([]image, error) {
	raw, err := read(l.files, v1.ImageIndexFile)
	if err != nil {
		return nil, err
	}
	var index v1.Index
	if err := json.Unmarshal(raw, &index); err != nil {
		return nil, fmt.Errorf("%s: %w", v1.ImageIndexFile, err)
	}
	var out []image
	for _, d := range index.Manifests {
		name := d.Annotations[containerdName]
		if ref := d.Annotations[v1.AnnotationRefName]; name == "" && strings.Contains(ref, "/") {
			name = ref
		}
		if as != "" && len(index.Manifests) == 1 {
			name = as
		}
		if name == "" {
			return nil, fmt.Errorf("manifest %s has no name of a registry's image: give one with --as (one image a layout)", d.Digest)
		}
		out = append(out, image{name, d, l})
	}
	if len(out) == 0 {
		return nil, errors.New("there is no image in it")
	}
	return out, nil
}

// saved is an archive of `docker save` from before it held a layout: it has no manifests, so that one is made.
type saved struct {
	files
	manifests map[digest.Digest][]byte
	at        map[digest.Digest]string
}

func (s *saved) manifest(_ context.Context, d v1.Descriptor) ([]byte, error) {
	if raw, ok := s.manifests[d.Digest]; ok {
		return raw, nil
	}
	return nil, fs.ErrNotExist
}

func (s *saved) blob(_ context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	body, _, err := s.open(s.at[d.Digest])
	return body, err
}

// describe reads a file for its digest.
func (s *saved) describe(name, media string) (v1.Descriptor, error) {
	body, size, err := s.open(name)
	if err != nil {
		return v1.Descriptor{}, err
	}
	defer body.Close()
	d, err := digest.FromReader(body)
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("%s: %w", name, err)
	}
	s.at[d] = name
	return v1.Descriptor{MediaType: media, Digest: d, Size: size}, nil
}

// savedImages returns the images of such an archive, by their tags.
func savedImages(f files, as string) ([]image, error) {
	raw, err := read(f, "manifest.json")
	if err != nil {
		return nil, err
	}
	var list []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, fmt.Errorf("manifest.json: %w", err)
	}
	var out []image
	s := &saved{f, map[digest.Digest][]byte{}, map[digest.Digest]string{}}
	for _, e := range list {
		m := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest}
		if m.Config, err = s.describe(e.Config, v1.MediaTypeImageConfig); err != nil {
			return nil, err
		}
		for _, l := range e.Layers {
			d, err := s.describe(l, v1.MediaTypeImageLayer)
			if err != nil {
				return nil, err
			}
			m.Layers = append(m.Layers, d)
		}
		made, err := json.Marshal(m)
		if err != nil {
			return nil, err
		}
		root := v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromBytes(made), Size: int64(len(made))}
		s.manifests[root.Digest] = made
		names := e.RepoTags
		if as != "" && len(list) == 1 {
			names = []string{as}
		}
		if len(names) == 0 {
			return nil, fmt.Errorf("image %s has no tag: give a name with --as", m.Config.Digest)
		}
		for _, n := range names {
			out = append(out, image{dockerName(n), root, s})
		}
	}
	return out, nil
}

// dockerName is the whole of a name as Docker writes it: nginx:1 is docker.io/library/nginx:1.
func dockerName(short string) string {
	first, _, ok := strings.Cut(short, "/")
	if ok && (strings.ContainsAny(first, ".:") || first == "localhost") {
		return short
	}
	return "docker.io/" + short
}

// openFiles returns the images of a layout in a folder, of one in an archive, or of `docker save`. close ends their
// use.
func openFiles(at, as string) (images []image, close func() error, err error) {
	info, err := os.Stat(at)
	if err != nil {
		return nil, nil, err
	}
	if info.IsDir() {
		images, err = layout{folder(at)}.images(as)
		return images, func() error { return nil }, err
	}
	file, err := os.Open(at)
	if err != nil {
		return nil, nil, err
	}
	a, err := openArchive(file)
	if err == nil {
		if _, isLayout := a.at[v1.ImageIndexFile]; isLayout {
			images, err = layout{a}.images(as)
		} else {
			images, err = savedImages(a, as)
		}
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("%s: %w", at, err), file.Close())
	}
	return images, file.Close, nil
}
