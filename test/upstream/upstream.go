// Package upstream is a registry outside the cluster as tests need one: it holds what it is given, counts what it is
// asked, and fails by a script: it hangs, cuts, lies, refuses, redirects and moves tags.
package upstream

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Options are how a Registry is. The zero value is one without TLS and login, which knows ranges.
type Options struct {
	// TLS serves with a certificate of Registry.CAFile.
	TLS bool
	// Basic and Token want a login: User and Password as they are, or a token from the registry's own token service.
	Basic, Token   bool
	User, Password string
	// Others may log in by Basic as well: passwords by user.
	Others map[string]string
	// Anonymous gives tokens without a password as well, as public registries do.
	Anonymous bool
	// TokenTTL is how long a token lives, default 5 minutes.
	TokenTTL time.Duration
	// Private are repositories, by prefix, that only User gets tokens for, where Anonymous is set.
	Private []string
	// Storage redirects reads of blobs to another host, which refuses requests with an Authorization.
	Storage bool
	// NoRanges ignores Range.
	NoRanges bool
	// NoReferrers is a registry without the referrers API.
	NoReferrers bool
	// Rate bounds the bytes a second of each body; 0 is unlimited.
	Rate int
}

// Registry is a running one. Its methods may be called at any time.
type Registry struct {
	// URL has no slash at its end; Host is its host:port, Alias the same as first element of a repository's name.
	URL, Host, Alias string
	// CAFile is the PEM file to trust, empty without TLS.
	CAFile string

	o       Options
	t       testing.TB
	hung    chan struct{}
	storage *httptest.Server
	realm   *httptest.Server

	mu       sync.Mutex
	blobs    map[digest.Digest][]byte
	media    map[digest.Digest]string   // of manifests
	tags     map[string]digest.Digest   // repository:tag
	members  map[string]bool            // repository@digest
	subjects map[string][]v1.Descriptor // repository@digest
	tokens   map[string]issued          // by value
	requests []*Request
	rules    []*Rule
}

// New starts a registry that ends with the test.
func New(t testing.TB, o Options) *Registry {
	t.Helper()
	r := &Registry{
		o: o, t: t, hung: make(chan struct{}), blobs: map[digest.Digest][]byte{}, media: map[digest.Digest]string{}, tags: map[string]digest.Digest{},
		members: map[string]bool{}, subjects: map[string][]v1.Descriptor{}, tokens: map[string]issued{},
	}
	main := r.start(http.HandlerFunc(r.serve))
	r.URL, r.Host = main.URL, main.Listener.Addr().String()
	r.Alias = strings.Replace(r.Host, ":", "_", 1)
	if o.TLS {
		r.CAFile = filepath.Join(t.TempDir(), "ca.pem")
		b := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: main.Certificate().Raw})
		if err := os.WriteFile(r.CAFile, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if o.Storage {
		r.storage = r.start(http.HandlerFunc(r.serveStorage))
	}
	if o.Token {
		r.realm = r.start(http.HandlerFunc(r.serveToken))
	}
	t.Cleanup(func() { close(r.hung) }) // before the servers are closed, which wait for their requests
	return r
}

func (r *Registry) start(h http.Handler) *httptest.Server {
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // it aborts on purpose
	if r.o.TLS {
		s.StartTLS()
	} else {
		s.Start()
	}
	r.t.Cleanup(s.Close)
	return s
}

// Request is one that came.
type Request struct {
	// Kind is ping, head, manifest, referrers, tags, stat (a blob's HEAD), blob, storage, token or other.
	Kind       string
	Method     string
	Repository string
	Reference  string // a tag or a digest
	Range      string
	Authorized bool   // it had an Authorization
	User       string // of a Basic one
	Host       string
	Status     int // 0 while it is answered, and where nothing was
}

// Requests returns those that came, in order.
func (r *Registry) Requests() []Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]Request, 0, len(r.requests))
	for _, q := range r.requests {
		out = append(out, *q)
	}
	return out
}

// Count returns how many requests of a kind came, all where kind is empty, for a repository or reference that contains
// about.
func (r *Registry) Count(kind, about string) (n int) {
	for _, q := range r.Requests() {
		if (kind == "" || q.Kind == kind) && strings.Contains(q.Repository+" "+q.Reference, about) {
			n++
		}
	}
	return n
}

// Forget empties the list of requests.
func (r *Registry) Forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.requests = nil
}

// PutBlob adds a blob to a repository.
func (r *Registry) PutBlob(repo string, b []byte) v1.Descriptor {
	r.mu.Lock()
	defer r.mu.Unlock()
	d := digest.FromBytes(b)
	r.blobs[d] = b
	r.members[repo+"@"+d.String()] = true
	return v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: d, Size: int64(len(b))}
}

// Drop forgets a repository's blobs, manifests and tags, and the blobs of others that are the same.
func (r *Registry) Drop(repo string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for at := range r.members {
		if of, d, _ := strings.Cut(at, "@"); of == repo {
			delete(r.members, at)
			delete(r.blobs, digest.Digest(d))
			delete(r.media, digest.Digest(d))
		}
	}
	for at := range r.tags {
		if of, _, _ := strings.Cut(at, ":"); of == repo {
			delete(r.tags, at)
		}
	}
}

// PutManifest adds a manifest, under a tag unless that is empty, and moves the tag where it was there.
func (r *Registry) PutManifest(repo, tag, mediaType string, raw []byte) v1.Descriptor {
	var doc struct {
		Subject      *v1.Descriptor    `json:"subject"`
		ArtifactType string            `json:"artifactType"`
		Annotations  map[string]string `json:"annotations"`
	}
	if err := json.Unmarshal(raw, &doc); err != nil {
		r.t.Fatalf("put manifest: %v", err)
	}
	desc := r.PutBlob(repo, raw)
	desc.MediaType, desc.ArtifactType, desc.Annotations = mediaType, doc.ArtifactType, doc.Annotations
	r.mu.Lock()
	defer r.mu.Unlock()
	r.media[desc.Digest] = mediaType
	if tag != "" {
		r.tags[repo+":"+tag] = desc.Digest
	}
	if doc.Subject != nil {
		at := repo + "@" + doc.Subject.Digest.String()
		r.subjects[at] = append(r.subjects[at], desc)
	}
	return desc
}

// Image is an image that was put.
type Image struct {
	Manifest v1.Descriptor
	Config   v1.Descriptor
	Layers   []v1.Descriptor
}

// PutImage adds an image with these layers under a tag, which may be empty.
func (r *Registry) PutImage(repo, tag string, layers ...[]byte) Image {
	r.t.Helper()
	config := fmt.Appendf(nil, `{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"config":{"Labels":{"of":%q}}}`, fmt.Sprint(repo, len(layers)))
	img := Image{Config: r.PutBlob(repo, config)}
	img.Config.MediaType = v1.MediaTypeImageConfig
	for _, l := range layers {
		img.Layers = append(img.Layers, r.PutBlob(repo, l))
	}
	img.Manifest = r.PutManifest(repo, tag, v1.MediaTypeImageManifest, Marshal(r.t, v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, Config: img.Config, Layers: img.Layers,
	}))
	return img
}

// PutIndex adds an index of manifests under a tag.
func (r *Registry) PutIndex(repo, tag string, of ...v1.Descriptor) v1.Descriptor {
	r.t.Helper()
	return r.PutManifest(repo, tag, v1.MediaTypeImageIndex, Marshal(r.t, v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: of}))
}

// PutReferrer adds a manifest with one layer whose subject is another manifest.
func (r *Registry) PutReferrer(repo string, subject v1.Descriptor, artifactType string, content []byte) v1.Descriptor {
	r.t.Helper()
	config := r.PutBlob(repo, []byte("{}"))
	config.MediaType = v1.MediaTypeEmptyJSON
	return r.PutManifest(repo, "", v1.MediaTypeImageManifest, Marshal(r.t, v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, ArtifactType: artifactType, Config: config,
		Layers: []v1.Descriptor{r.PutBlob(repo, content)}, Subject: &subject,
	}))
}

// DeleteTag removes a tag.
func (r *Registry) DeleteTag(repo, tag string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.tags, repo+":"+tag)
}

// Marshal is json.Marshal.
func Marshal(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Stop makes the registry refuse connections until the returned function is called. Open ones are closed.
func (r *Registry) Stop() (resume func()) {
	return r.Fail(Rule{Refuse: true})
}

// Random returns n bytes that a seed decides and that don't compress to nothing.
func Random(seed, n int) []byte {
	var b bytes.Buffer
	b.Grow(n + 32)
	for i := 0; b.Len() < n; i++ {
		b.Write([]byte(digest.FromString(fmt.Sprint(seed, i)).Encoded()))
	}
	return b.Bytes()[:n]
}

// tcpOf returns the TCP connection below c.
func tcpOf(c net.Conn) *net.TCPConn {
	if t, ok := c.(interface{ NetConn() net.Conn }); ok {
		c = t.NetConn()
	}
	tcp, _ := c.(*net.TCPConn)
	return tcp
}
