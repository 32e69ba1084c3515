package registry

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// memory is a small correct registry, to serve and to speak to in tests.
type memory struct {
	mu       sync.Mutex
	blobs    map[string]map[digest.Digest][]byte
	uploads  map[string][]byte
	n        int
	tags     map[string]map[string]digest.Digest
	contents map[digest.Digest]*Manifest
	down     bool // every call is ErrUnavailable
}

func newMemory() *memory {
	return &memory{blobs: map[string]map[digest.Digest][]byte{}, uploads: map[string][]byte{}, tags: map[string]map[string]digest.Digest{}, contents: map[digest.Digest]*Manifest{}}
}

func (m *memory) enter() (func(), error) {
	m.mu.Lock()
	if m.down {
		m.mu.Unlock()
		return nil, fmt.Errorf("%w: down on purpose", ErrUnavailable)
	}
	return m.mu.Unlock, nil
}

func (m *memory) blob(repo string, d digest.Digest) ([]byte, error) {
	b, ok := m.blobs[repo][d]
	if !ok {
		return nil, fmt.Errorf("%w: %s", ErrBlobUnknown, d)
	}
	return b, nil
}

func (m *memory) StatBlob(_ context.Context, repo string, d digest.Digest) (v1.Descriptor, error) {
	leave, err := m.enter()
	if err != nil {
		return v1.Descriptor{}, err
	}
	defer leave()
	b, err := m.blob(repo, d)
	return v1.Descriptor{Digest: d, Size: int64(len(b))}, err
}

func (m *memory) OpenBlob(_ context.Context, repo string, d digest.Digest, _ Range) (*Content, error) {
	leave, err := m.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	b, err := m.blob(repo, d)
	if err != nil {
		return nil, err
	}
	return &Content{Digest: d, Size: int64(len(b)), Body: bytes.NewReader(b), Close: func() error { return nil }}, nil
}

func (m *memory) put(repo string, b []byte, d digest.Digest) {
	if m.blobs[repo] == nil {
		m.blobs[repo] = map[digest.Digest][]byte{}
	}
	m.blobs[repo][d] = b
}

func (m *memory) DeleteBlob(_ context.Context, repo string, d digest.Digest) error {
	leave, err := m.enter()
	if err != nil {
		return err
	}
	defer leave()
	if _, err := m.blob(repo, d); err != nil {
		return err
	}
	delete(m.blobs[repo], d)
	return nil
}

func (m *memory) MountBlob(_ context.Context, repo, _ string, d digest.Digest) (v1.Descriptor, error) {
	leave, err := m.enter()
	if err != nil {
		return v1.Descriptor{}, err
	}
	defer leave()
	for name := range m.blobs {
		if b, err := m.blob(name, d); err == nil {
			m.put(repo, b, d)
			return v1.Descriptor{Digest: d, Size: int64(len(b))}, nil
		}
	}
	return v1.Descriptor{}, ErrBlobUnknown
}

func (m *memory) StartUpload(_ context.Context, repo string, _ UploadOptions) (Upload, error) {
	leave, err := m.enter()
	if err != nil {
		return Upload{}, err
	}
	defer leave()
	m.n++
	id := fmt.Sprintf("session-%d", m.n)
	m.uploads[repo+" "+id] = []byte{}
	return Upload{ID: id}, nil
}

func (m *memory) UploadStatus(_ context.Context, repo, id string) (Upload, error) {
	leave, err := m.enter()
	if err != nil {
		return Upload{}, err
	}
	defer leave()
	b, ok := m.uploads[repo+" "+id]
	if !ok {
		return Upload{}, ErrBlobUploadUnknown
	}
	return Upload{id, int64(len(b))}, nil
}

func (m *memory) WriteUpload(ctx context.Context, repo, id string, c Chunk) (Upload, error) {
	u, err := m.UploadStatus(ctx, repo, id)
	if err != nil {
		return u, err
	}
	if c.Offset >= 0 && c.Offset != u.Offset {
		return u, &RangeError{Upload: u, Got: c.Offset}
	}
	var b []byte
	if c.Body != nil {
		if b, err = io.ReadAll(c.Body); err != nil {
			return u, err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.uploads[repo+" "+id] = append(m.uploads[repo+" "+id], b...)
	return Upload{id, u.Offset + int64(len(b))}, nil
}

func (m *memory) CommitUpload(ctx context.Context, repo, id string, d digest.Digest, c Chunk) (v1.Descriptor, error) {
	if _, err := m.WriteUpload(ctx, repo, id, c); err != nil {
		return v1.Descriptor{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	b := m.uploads[repo+" "+id]
	delete(m.uploads, repo+" "+id)
	if got := d.Algorithm().FromBytes(b); got != d {
		return v1.Descriptor{}, fmt.Errorf("%w: content is %s", ErrDigestInvalid, got)
	}
	m.put(repo, b, d)
	return v1.Descriptor{Digest: d, Size: int64(len(b))}, nil
}

func (m *memory) AbortUpload(ctx context.Context, repo, id string) error {
	if _, err := m.UploadStatus(ctx, repo, id); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.uploads, repo+" "+id)
	return nil
}

func (m *memory) GetManifest(_ context.Context, repo string, ref Reference, o GetOptions) (*Manifest, error) {
	leave, err := m.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	d := ref.Digest
	if ref.Tag != "" {
		d = m.tags[repo][ref.Tag]
	}
	c, ok := m.contents[d]
	if !ok {
		return nil, fmt.Errorf("%w: %s", ErrManifestUnknown, ref)
	}
	out := *c
	if o.Have == d {
		out.Bytes = nil
	}
	return &out, nil
}

func (m *memory) PutManifest(_ context.Context, repo string, ref Reference, mediaType string, raw []byte, o PutOptions) (PutResult, error) {
	leave, err := m.enter()
	if err != nil {
		return PutResult{}, err
	}
	defer leave()
	tags := o.Tags
	if ref.Tag != "" {
		tags = []string{ref.Tag}
	}
	allowed := func(now digest.Digest, exists bool) bool {
		return !(o.IfAbsent && exists || o.IfExists && !exists || o.IfMatch != nil && !slices.Contains(o.IfMatch, now) || exists && slices.Contains(o.IfNoneMatch, now))
	}
	for _, t := range tags {
		if now, exists := m.tags[repo][t]; !allowed(now, exists) {
			return PutResult{}, ErrPrecondition
		}
	}
	d := digest.FromBytes(raw)
	for _, t := range tags {
		if now, exists := m.tags[repo][t]; o.KeepTags && exists && now != d {
			return PutResult{}, ErrDenied
		}
	}
	if _, exists := m.contents[d]; len(tags) == 0 && !allowed(d, exists) {
		return PutResult{}, ErrPrecondition
	}
	if ref.Digest != "" && ref.Digest != d {
		return PutResult{}, ErrDigestInvalid
	}
	m.contents[d] = &Manifest{Digest: d, MediaType: mediaType, Bytes: raw}
	for _, t := range tags {
		if m.tags[repo] == nil {
			m.tags[repo] = map[string]digest.Digest{}
		}
		m.tags[repo][t] = d
	}
	return PutResult{Digest: d, Tags: o.Tags}, nil
}

func (m *memory) DeleteManifest(_ context.Context, repo string, ref Reference) error {
	leave, err := m.enter()
	if err != nil {
		return err
	}
	defer leave()
	if _, ok := m.tags[repo][ref.Tag]; !ok {
		return ErrManifestUnknown
	}
	delete(m.tags[repo], ref.Tag)
	return nil
}

func paged(names []string, p Page) Names {
	slices.Sort(names)
	i, found := slices.BinarySearch(names, p.Last)
	if found {
		i++
	}
	names = names[i:]
	if p.N >= 0 && len(names) > p.N {
		return Names{Names: names[:p.N], More: true}
	}
	return Names{Names: names}
}

func (m *memory) ListTags(_ context.Context, repo string, p Page) (Names, error) {
	leave, err := m.enter()
	if err != nil {
		return Names{}, err
	}
	defer leave()
	if m.tags[repo] == nil {
		return Names{}, ErrNameUnknown
	}
	var names []string
	for t := range m.tags[repo] {
		names = append(names, t)
	}
	return paged(names, p), nil
}

func (m *memory) ListRepositories(_ context.Context, p Page) (Names, error) {
	leave, err := m.enter()
	if err != nil {
		return Names{}, err
	}
	defer leave()
	var names []string
	for r := range m.tags {
		names = append(names, r)
	}
	return paged(names, p), nil
}

func (m *memory) ListReferrers(_ context.Context, _ string, d digest.Digest, artifactType, cursor string) (ReferrersPage, error) {
	if cursor != "" {
		return ReferrersPage{Filtered: artifactType != ""}, nil
	}
	return ReferrersPage{Descriptors: []v1.Descriptor{{MediaType: v1.MediaTypeImageManifest, Digest: d, Size: 7}}, Filtered: artifactType != "", Next: "more"}, nil
}

func (m *memory) server() Server {
	return Server{Dialect: dialect(), Blobs: m, BlobDeleter: m, Uploads: m, Mounter: m, Manifests: m, ManifestWriter: m, Tags: m, Catalog: m, Referrers: m}
}

// dialect is one like that of a cluster's roles.
func dialect() Dialect {
	return Dialect{
		Extension: "_kraken", Digest: "Kraken-Digest", Size: "Kraken-Size", Source: "Kraken-Source", Offset: "Kraken-Offset",
		Check: func(r *http.Request) error {
			if r.Header.Get("Kraken-Version") == "99" {
				return &Error{"UNSUPPORTED", http.StatusBadRequest, "version 99 is not supported"}
			}
			return nil
		},
	}
}
