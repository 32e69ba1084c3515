package airgap

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/registry"
	"kraken/proto/role"
	"kraken/test/upstream"
)

// shelf is a registry that takes pushes. It implements what a registry.Server needs for that.
type shelf struct {
	mu        sync.Mutex
	blobs     map[string][]byte // repository@digest
	manifests map[string][]byte // repository:tag, repository@digest
	uploads   int
	closed    bool // to pushes
}

func (s *shelf) StatBlob(_ context.Context, repo string, d digest.Digest) (v1.Descriptor, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b, ok := s.blobs[repo+"@"+d.String()]; ok {
		return v1.Descriptor{Digest: d, Size: int64(len(b))}, nil
	}
	return v1.Descriptor{}, registry.ErrBlobUnknown
}

func (s *shelf) OpenBlob(context.Context, string, digest.Digest, registry.Range) (*registry.Content, error) {
	return nil, registry.ErrBlobUnknown
}

func (s *shelf) StartUpload(context.Context, string, registry.UploadOptions) (registry.Upload, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return registry.Upload{}, registry.ErrUnsupported
	}
	s.uploads++
	return registry.Upload{ID: fmt.Sprint("u", s.uploads)}, nil
}

func (s *shelf) UploadStatus(context.Context, string, string) (registry.Upload, error) {
	return registry.Upload{}, registry.ErrBlobUploadUnknown
}

func (s *shelf) WriteUpload(context.Context, string, string, registry.Chunk) (registry.Upload, error) {
	return registry.Upload{}, registry.ErrBlobUploadUnknown
}

func (s *shelf) AbortUpload(context.Context, string, string) error { return nil }

func (s *shelf) CommitUpload(_ context.Context, repo, _ string, d digest.Digest, c registry.Chunk) (v1.Descriptor, error) {
	b, err := io.ReadAll(c.Body)
	if err != nil || digest.FromBytes(b) != d {
		return v1.Descriptor{}, registry.ErrDigestInvalid
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.blobs[repo+"@"+d.String()] = b
	return v1.Descriptor{Digest: d, Size: int64(len(b))}, nil
}

func (s *shelf) PutManifest(_ context.Context, repo string, ref registry.Reference, _ string, raw []byte, _ registry.PutOptions) (registry.PutResult, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := digest.FromBytes(raw)
	s.manifests[repo+"@"+d.String()] = raw
	if ref.Tag != "" {
		s.manifests[repo+":"+ref.Tag] = raw
	}
	return registry.PutResult{Digest: d}, nil
}

func (s *shelf) DeleteManifest(context.Context, string, registry.Reference) error { return nil }

func newShelf(t *testing.T) (*shelf, string) {
	t.Helper()
	s := &shelf{blobs: map[string][]byte{}, manifests: map[string][]byte{}}
	srv := httptest.NewServer(registry.Server{Blobs: s, Uploads: s, ManifestWriter: s}.Handler())
	t.Cleanup(srv.Close)
	return s, srv.URL
}

// files of an OCI layout of an index of two images.
func layoutFiles(t *testing.T, annotations map[string]string) (map[string][]byte, digest.Digest) {
	t.Helper()
	out := map[string][]byte{}
	put := func(media string, v any) v1.Descriptor {
		b, raw := v.([]byte)
		if !raw {
			var err error
			if b, err = json.Marshal(v); err != nil {
				t.Fatal(err)
			}
		}
		d := digest.FromBytes(b)
		out["blobs/sha256/"+d.Encoded()] = b
		return v1.Descriptor{MediaType: media, Digest: d, Size: int64(len(b))}
	}
	var children []v1.Descriptor
	for _, arch := range []string{"amd64", "arm64"} {
		children = append(children, put(v1.MediaTypeImageManifest, v1.Manifest{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, Config: put(v1.MediaTypeImageConfig, []byte(`{"architecture":"`+arch+`"}`)),
			Layers: []v1.Descriptor{put(v1.MediaTypeImageLayer, []byte("a layer of both")), put(v1.MediaTypeImageLayer, []byte("a layer of "+arch))},
		}))
	}
	root := put(v1.MediaTypeImageIndex, v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: children})
	root.Annotations = annotations
	index, err := json.Marshal(v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []v1.Descriptor{root}})
	if err != nil {
		t.Fatal(err)
	}
	out["index.json"], out["oci-layout"] = index, []byte(`{"imageLayoutVersion":"1.0.0"}`)
	return out, root.Digest
}

func writeFolder(t *testing.T, files map[string][]byte) string {
	t.Helper()
	dir := t.TempDir()
	for name, b := range files {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func writeTar(t *testing.T, files map[string][]byte) string {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for name, b := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(b)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "images.tar")
	if err := os.WriteFile(name, out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

// run is `kraken import` with arguments.
func run(t *testing.T, args ...string) (code int, out string) {
	t.Helper()
	var b bytes.Buffer
	code = role.Execute(t.Context(), Command(), args, &b, &b)
	return code, b.String()
}

// A layout, in a folder or an archive, arrives whole under the name that it says, and a second time nothing is pushed.
func TestLayouts(t *testing.T) {
	files, root := layoutFiles(t, map[string]string{containerdName: "docker.io/library/nginx:1.27"})
	for name, at := range map[string]string{"folder": writeFolder(t, files), "archive": writeTar(t, files)} {
		s, url := newShelf(t)
		for range 2 {
			if code, out := run(t, "--to", url, at); code != 0 || !strings.Contains(out, "[1/1] docker.io/library/nginx:1.27@"+root.String()) {
				t.Fatalf("%s: %d %s", name, code, out)
			}
		}
		if got := s.manifests["docker.io/library/nginx:1.27"]; digest.FromBytes(got) != root || len(s.manifests) != 4 || len(s.blobs) != 5 || s.uploads > 6 {
			t.Errorf("%s: %d manifests, %d blobs, %d uploads", name, len(s.manifests), len(s.blobs), s.uploads)
		}
	}
	s, url := newShelf(t)
	plain, _ := layoutFiles(t, nil)
	at := writeFolder(t, plain)
	if code, out := run(t, "--to", url, at); code == 0 || !strings.Contains(out, "--as") {
		t.Errorf("without a name: %d %s", code, out)
	}
	if code, out := run(t, "--to", url, "--as", "nginx:1", at); code == 0 || !strings.Contains(out, "registry/repository:tag") {
		t.Errorf("under a name of the cluster's own: %d %s", code, out)
	}
	if code, out := run(t, "--to", url, "--as", "registry.corp:5000/team/app:2", at); code != 0 || s.manifests["registry.corp_5000/team/app:2"] == nil {
		t.Errorf("with a name: %d %s", code, out)
	}
	s.closed = true
	if code, out := run(t, "--to", url, "--as", "docker.io/library/other:2", at); code == 0 || !strings.Contains(out, "import: true") {
		t.Errorf("to a cluster that takes no imports: %d %s", code, out)
	}
	blob := "blobs/sha256/" + digest.FromString("a layer of amd64").Encoded()
	plain[blob] = []byte("a layer of amd46")
	if code, _ := run(t, "--to", url, "--as", "quay.io/a/b:2", writeFolder(t, plain)); code == 0 {
		t.Error("a layout whose layer is another was carried")
	}
}

// What docker save wrote, by the tags that it has.
func TestDockerSave(t *testing.T) {
	manifest, err := json.Marshal([]map[string]any{{"Config": "abc.json", "RepoTags": []string{"nginx:1", "quay.io/a/b:2"}, "Layers": []string{"1/layer.tar"}}})
	if err != nil {
		t.Fatal(err)
	}
	s, url := newShelf(t)
	code, out := run(t, "--to", url, writeTar(t, map[string][]byte{"manifest.json": manifest, "abc.json": []byte(`{"os":"linux"}`), "1/layer.tar": []byte("tar")}))
	if code != 0 || s.manifests["docker.io/library/nginx:1"] == nil || s.manifests["quay.io/a/b:2"] == nil {
		t.Errorf("%d %s", code, out)
	}
	if code, out := run(t, "--to", url, writeTar(t, map[string][]byte{"x": nil})); code == 0 || !strings.Contains(out, "manifest.json") {
		t.Errorf("an archive of something else: %d %s", code, out)
	}
}

// Images of a list are read from their registries, and only what has the digest that was written down.
func TestList(t *testing.T) {
	up := upstream.New(t, upstream.Options{})
	img := up.PutImage("team/app", "v1", []byte("a layer"))
	s, url := newShelf(t)
	write := func(text string) string {
		name := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return name
	}
	list := write("# ours\n" + up.Host + "/team/app:v1\n")
	good, wrong := write(up.Host+"/team/app:v1 "+img.Manifest.Digest.String()+"\n"), write(digest.FromString("x").String()+"  "+up.Host+"/team/app:v1\n")
	if code, out := run(t, "--to", url, "--plain-http", "--list", list, "--digests", wrong); code == 0 {
		t.Errorf("another digest: %s", out)
	}
	if code, out := run(t, "--to", url, "--plain-http", "--list", list, "--digests", write("")); code == 0 || !strings.Contains(out, "does not have it") {
		t.Errorf("no digest: %d %s", code, out)
	}
	for _, args := range [][]string{{"--digests", good}, nil} {
		if code, out := run(t, append([]string{"--to", url, "--plain-http", "--list", list}, args...)...); code != 0 || digest.FromBytes(s.manifests[up.Alias+"/team/app:v1"]) != img.Manifest.Digest {
			t.Errorf("%v: %d %s", args, code, out)
		}
	}
}

// Whatever an archive says, nothing outside of it is read.
func FuzzArchive(f *testing.F) {
	f.Add([]byte("x"), "nginx:1")
	f.Fuzz(func(t *testing.T, b []byte, as string) {
		name := filepath.Join(t.TempDir(), "a.tar")
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		images, done, err := openFiles(name, as)
		if err != nil {
			return
		}
		for _, i := range images {
			_, _ = parseName(i.name)
		}
		if err := done(); err != nil {
			t.Error(err)
		}
	})
}
