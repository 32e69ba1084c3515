package sim

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/registry"
	"kraken/proto/transport"
)

// client is what people and CI have: a client of one proxy.
type client struct {
	name string
	p    *process
	hc   *http.Client
	*registry.Client
}

func newClient(s *Sim, p *process, proxy *node) (*client, error) {
	hc, err := transport.NewClient(transport.ClientConfig{Dial: p.dial}, nil)
	if err != nil {
		return nil, err
	}
	c, err := registry.NewClient("http://"+proxy.h.addr(), hc)
	return &client{proxy.name, p, hc, c}, err
}

// Image is what is pushed and pulled: its blobs, the first of which is its config, and its manifest.
type Image struct {
	Name     string
	Blobs    [][]byte
	manifest []byte
	digest   digest.Digest
}

// content returns the bytes of a blob, the same for the same number.
func content(number, size int) []byte {
	b := make([]byte, size)
	r := rand.NewChaCha8([32]byte{byte(number), byte(number >> 8), 1})
	_, _ = r.Read(b) // never fails
	return b
}

// NewImage returns the image of some blobs.
func NewImage(name string, blobs ...[]byte) *Image {
	i := &Image{Name: name, Blobs: blobs}
	m := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, Annotations: map[string]string{"name": name}}
	for k, b := range blobs {
		d := v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: digest.FromBytes(b), Size: int64(len(b))}
		if k == 0 {
			d.MediaType = v1.MediaTypeImageConfig
			m.Config = d
			continue
		}
		m.Layers = append(m.Layers, d)
	}
	i.manifest, _ = json.Marshal(m) // of strings and numbers: never fails
	i.digest = digest.FromBytes(i.manifest)
	return i
}

// Push is how an image is pushed.
type Push struct {
	Chunks  int  // 0: each blob in one PUT
	Hint    bool // the digest is told at the start
	Spread  bool // chunks go by both proxies in turn
	Skip    bool // what is there already, as HEAD says, is not pushed
	Tries   int  // of each request, 0: 6
	Timeout time.Duration
}

const (
	defaultTries   = 6
	defaultTimeout = 45 * time.Second
)

func (p Push) tries() int {
	if p.Tries == 0 {
		return defaultTries
	}
	return p.Tries
}

func (p Push) timeout() time.Duration {
	if p.Timeout == 0 {
		return defaultTimeout
	}
	return p.Timeout
}

// lock lets one operation at a time change a repository. It waits in a way that lets time go on.
func (s *Sim) lock(repo string) (unlock func()) {
	s.mu.Lock()
	ch := s.repos[repo]
	if ch == nil {
		ch = make(chan struct{}, 1)
		s.repos[repo] = ch
	}
	s.mu.Unlock()
	ch <- struct{}{}
	return func() { <-ch }
}

// definite says that a request was answered by a refusal, so that it did nothing.
func definite(err error) bool {
	var e *registry.Error
	return errors.As(err, &e) && e.Status < 500 && e != registry.ErrTooManyRequests
}

// change makes one request that changes names, and tells the model. again says that a refusal after an unanswered try
// may mean that this one was done.
func (s *Sim) change(at *client, a func() *attempt, do func(ctx context.Context, c *client) error, what string, p Push) error {
	var err error
	for try := range p.tries() {
		if try > 0 {
			time.Sleep(time.Duration(200+100*try) * time.Millisecond)
		}
		s.mu.Lock()
		this := a()
		s.mu.Unlock()
		ctx, cancel := context.WithTimeout(context.Background(), p.timeout())
		err = do(ctx, at)
		cancel()
		s.mu.Lock()
		switch {
		case err == nil:
			this.acknowledged()
		case definite(err):
			this.refused()
		}
		s.mu.Unlock()
		if err == nil || definite(err) {
			break
		}
		s.history.note("    %s by %s: try %d: %s", what, at.name, try+1, brief(err))
	}
	s.history.note("  %s by %s: %s", what, at.name, brief(err))
	return err
}

// brief is an error as a history has it.
func brief(err error) string {
	if err == nil {
		return "done"
	}
	text := err.Error()
	if len(text) > 160 {
		text = text[:160] + "…"
	}
	return text
}

// PushImage pushes an image by a proxy, under a tag if that is not empty. It returns nil when all was acknowledged.
func (s *Sim) PushImage(proxy int, repo, tag string, i *Image, p Push) error {
	c := s.clients[proxy]
	for _, b := range i.Blobs {
		if err := s.pushBlob(proxy, repo, b, p); err != nil {
			s.history.note("  push %s of %s by %s: blob %s: %s", i.Name, repo, c.name, short(digest.FromBytes(b).String()), brief(err))
			return err
		}
	}
	var refs []digest.Digest
	for _, b := range i.Blobs {
		refs = append(refs, digest.FromBytes(b))
	}
	s.mu.Lock()
	s.model.refs[i.digest.String()] = refs
	s.mu.Unlock()
	changes := map[name]string{{"manifest", repo, i.digest.String()}: there}
	ref := registry.Reference{Digest: i.digest}
	if tag != "" {
		ref = registry.Reference{Tag: tag}
		changes[name{"tag", repo, tag}] = i.digest.String()
	}
	for _, b := range i.Blobs {
		changes[name{"layer", repo, digest.FromBytes(b).String()}] = there
	}
	return s.change(c, func() *attempt { return s.model.begin(changes) }, func(ctx context.Context, c *client) error {
		_, err := c.PutManifest(ctx, repo, ref, v1.MediaTypeImageManifest, i.manifest, registry.PutOptions{})
		return err
	}, fmt.Sprintf("push %s of %s:%s", short(i.digest.String()), repo, tag), p)
}

// pushBlob uploads a blob, resuming and beginning anew as clients do.
func (s *Sim) pushBlob(proxy int, repo string, b []byte, p Push) error {
	d := digest.FromBytes(b)
	if p.Skip {
		ctx, cancel := context.WithTimeout(context.Background(), p.timeout())
		_, err := s.clients[proxy].StatBlob(ctx, repo, d)
		cancel()
		if err == nil {
			return nil
		}
	}
	var err error
	for try := range p.tries() {
		if try > 0 {
			time.Sleep(time.Duration(200+100*try) * time.Millisecond)
		}
		if err = s.upload(proxy, repo, d, b, p); err == nil {
			return nil
		}
		s.history.note("    push blob %s of %s by %s: try %d: %s", short(d.String()), repo, s.clients[proxy].name, try+1, brief(err))
	}
	return err
}

// by is the client of a request of an upload.
func (s *Sim) by(proxy, request int, p Push) *client {
	if p.Spread {
		proxy += request
	}
	return s.clients[proxy%len(s.clients)]
}

// upload is one session, from its start to its commit.
func (s *Sim) upload(proxy int, repo string, d digest.Digest, b []byte, p Push) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*p.timeout())
	defer cancel()
	began := time.Now()
	o := registry.UploadOptions{Size: -1}
	if p.Hint {
		o.Digest, o.Size = d, int64(len(b))
	}
	u, err := s.by(proxy, 0, p).StartUpload(ctx, repo, o)
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	size := len(b)
	if p.Chunks > 0 {
		size = len(b)/p.Chunks + 1
	}
	requests := 0
	for u.Offset < int64(len(b)) && p.Chunks > 0 {
		requests++
		if requests > 4*p.Chunks+4 {
			return errors.New("the upload does not get on")
		}
		end := min(u.Offset+int64(size), int64(len(b)))
		part := b[u.Offset:end]
		next, err := s.by(proxy, requests, p).WriteUpload(ctx, repo, u.ID, registry.Chunk{Offset: u.Offset, Length: int64(len(part)), Body: bytes.NewReader(part)})
		if err != nil {
			var out *registry.RangeError
			if errors.As(err, &out) {
				next, err = out.Upload, nil
			} else if next, err = s.by(proxy, requests+1, p).UploadStatus(ctx, repo, u.ID); err != nil {
				return fmt.Errorf("chunk at %d: %w", u.Offset, err)
			}
		}
		u = next
	}
	last := registry.Chunk{Offset: -1, Length: int64(len(b)), Body: bytes.NewReader(b)}
	if p.Chunks > 0 {
		last = registry.Chunk{Offset: -1}
	}
	return s.commit(ctx, s.by(proxy, requests+1, p), session{repo, u.ID, d, began}, last)
}

// session is an upload all of whose bytes but the last chunk were sent.
type session struct {
	repo, id string
	digest   digest.Digest
	began    time.Time
}

// commit is the last request of an upload. Its answer makes the blob acknowledged.
func (s *Sim) commit(ctx context.Context, c *client, u session, last registry.Chunk) error {
	s.mu.Lock()
	a := s.model.begin(map[name]string{{"layer", u.repo, u.digest.String()}: there})
	s.mu.Unlock()
	_, err := c.CommitUpload(ctx, u.repo, u.id, u.digest, last)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err == nil:
		a.acknowledged()
		s.acknowledge(u.digest, u.repo, u.began)
	case definite(err):
		a.refused()
	}
	if err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	return nil
}

// Mount makes a blob of one repository a member of another.
func (s *Sim) Mount(proxy int, repo, from string, b []byte, p Push) error {
	d := digest.FromBytes(b)
	changes := map[name]string{{"layer", repo, d.String()}: there}
	return s.change(s.clients[proxy], func() *attempt { return s.model.begin(changes) }, func(ctx context.Context, c *client) error {
		_, err := c.MountBlob(ctx, repo, from, d)
		return err
	}, fmt.Sprintf("mount %s from %s into %s", short(d.String()), from, repo), p)
}

// DeleteTag deletes a tag.
func (s *Sim) DeleteTag(proxy int, repo, tag string, p Push) error {
	changes := map[name]string{{"tag", repo, tag}: absent}
	return s.change(s.clients[proxy], func() *attempt { return s.model.begin(changes) }, func(ctx context.Context, c *client) error {
		return c.DeleteManifest(ctx, repo, registry.Reference{Tag: tag})
	}, fmt.Sprintf("delete %s:%s", repo, tag), p)
}

// DeleteImage deletes a manifest, and with it its tags.
func (s *Sim) DeleteImage(proxy int, repo string, i *Image, p Push) error {
	n := name{"manifest", repo, i.digest.String()}
	return s.change(s.clients[proxy], func() *attempt { return s.model.beginDelete(n) }, func(ctx context.Context, c *client) error {
		return c.DeleteManifest(ctx, repo, registry.Reference{Digest: i.digest})
	}, fmt.Sprintf("delete %s of %s", short(i.digest.String()), repo), p)
}

// DeleteBlob ends a membership.
func (s *Sim) DeleteBlob(proxy int, repo string, b []byte, p Push) error {
	d := digest.FromBytes(b)
	changes := map[name]string{{"layer", repo, d.String()}: absent}
	return s.change(s.clients[proxy], func() *attempt { return s.model.begin(changes) }, func(ctx context.Context, c *client) error {
		return c.Client.DeleteBlob(ctx, repo, d)
	}, fmt.Sprintf("delete blob %s of %s", short(d.String()), repo), p)
}

// errNoAnswer is that a name could not be asked for.
var errNoAnswer = errors.New("no answer")

// read returns the value of a name by one request, or errNoAnswer; and the bytes of a blob or manifest.
func (s *Sim) read(c *client, n name, timeout time.Duration) (value string, b []byte, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	if n.kind == "layer" {
		b, err = readBlob(ctx, c, n)
	} else {
		ref := registry.Reference{Tag: n.what}
		if n.kind == "manifest" {
			ref = registry.Reference{Digest: digest.Digest(n.what)}
		}
		var m *registry.Manifest
		if m, err = c.GetManifest(ctx, n.repo, ref, registry.GetOptions{}); err == nil {
			b = m.Bytes
			value = m.Digest.String()
		}
	}
	switch {
	case err == nil && n.kind == "tag":
		return value, b, nil
	case err == nil:
		return there, b, nil
	case errors.Is(err, registry.ErrBlobUnknown), errors.Is(err, registry.ErrManifestUnknown), errors.Is(err, registry.ErrNameUnknown):
		return absent, nil, nil
	}
	return "", nil, fmt.Errorf("%w: %w", errNoAnswer, err)
}

func readBlob(ctx context.Context, c *client, n name) ([]byte, error) {
	content, err := c.OpenBlob(ctx, n.repo, digest.Digest(n.what), registry.Whole)
	if err != nil {
		return nil, err
	}
	defer content.Close()
	b, err := io.ReadAll(content.Body)
	if err == nil && int64(len(b)) != content.Size {
		err = fmt.Errorf("%d bytes of %d", len(b), content.Size)
	}
	return b, err
}

// Read reads a name as a client does, with retries, and compares the answer with what may be there.
func (s *Sim) Read(proxy int, n name, tries int) error {
	var err error
	for try := range tries {
		if try > 0 {
			time.Sleep(time.Second)
		}
		c := s.clients[(proxy+try)%len(s.clients)]
		s.mu.Lock()
		r := s.model.beginRead(n)
		s.mu.Unlock()
		var v string
		var b []byte
		v, b, err = s.read(c, n, defaultTimeout)
		s.mu.Lock()
		r.end()
		s.mu.Unlock()
		if err != nil {
			s.history.note("    read %s by %s: %s", n, c.name, brief(err))
			continue
		}
		if err = s.judge(n, v, b, r, c); err == nil {
			return nil
		}
		if !errors.Is(err, errRotten) {
			return err
		}
		s.history.note("    read %s by %s: %s", n, c.name, brief(err))
	}
	return err
}

var (
	errWrongAnswer = errors.New("wrong answer")
	errRotten      = errors.New("rotten bytes")
)

// judge compares an answer with what may be.
func (s *Sim) judge(n name, v string, b []byte, r *reading, c *client) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v != absent && n.kind != "tag" && digest.FromBytes(b).String() != n.what {
		if s.isRotten(n.what) {
			return errRotten
		}
		s.history.violate("wrong", "%s: %s served %d bytes that are not it", n, c.name, len(b))
		return errWrongAnswer
	}
	if r.may[v] {
		return nil
	}
	kind := "stale"
	switch {
	case v == absent:
		kind = "lost"
		if n.kind == "layer" && s.mayBeLost(n.what) {
			return nil
		}
	case len(r.may) == 1 && r.may[absent]:
		kind = "back"
	}
	if v == absent {
		v = "absent"
	}
	s.history.violate(kind, "%s is %s at %s, and may be %s", n, short(v), c.name, r)
	return errWrongAnswer
}
