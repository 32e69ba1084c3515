package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/jellydator/ttlcache/v3"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// What runtimes do with a mirror decides these times. Some wait for the header of an answer for 30 s, others for ever;
// all of them go on to the upstream when they get 503.
const (
	headersWithin = 25 * time.Second
	// refuseFor is how long a blob is refused after a body of it was cut off: runtimes come back at once for what is
	// missing, and another cut would be the end of their pull.
	refuseFor = 5 * time.Second
	// hadFor is how long it counts that all blobs of a manifest could be had.
	hadFor = time.Minute
	// asksAtOnce bounds the questions about the blobs of one manifest that are under way.
	asksAtOnce = 8
)

var (
	errSlow    = errors.New("it takes longer than runtimes wait")
	errRefused = errors.New("reading it was cut off a moment ago")
)

// front is the agent as runtimes see it. For upstreams' repositories it keeps the promises of a mirror: runtimes have
// somewhere else to go, so that a quick error is better than a late answer, or than half of one. It implements
// registry.Blobs and registry.Manifests.
type front struct{ a *Agent }

// isUpstreams reports whether a repository is an upstream's.
func (a *Agent) isUpstreams(repo string) bool {
	_, _, ok := cluster.SplitUpstream(repo)
	return ok && a.namer.Upstreams().Any()
}

// choosesOnce reports whether the runtime that asks for a manifest will ask for its blobs here only: who names the
// registry in the path, or not at all, has chosen a mirror for the whole image.
func choosesOnce(ctx context.Context) bool {
	asked, ok := registry.AskedOf(ctx)
	return ok && asked.Namespace == ""
}

// GetManifest implements registry.Manifests.
func (f front) GetManifest(ctx context.Context, repo string, ref registry.Reference, o registry.GetOptions) (*registry.Manifest, error) {
	if !f.a.isUpstreams(repo) {
		m, err := f.a.GetManifest(ctx, repo, ref, o)
		if err == nil {
			f.a.learnMembers(ctx, repo, m)
		}
		return m, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, headersWithin, errSlow)
	defer cancel()
	m, err := f.a.GetManifest(ctx, repo, ref, registry.GetOptions{})
	if err == nil {
		f.a.learnMembers(ctx, repo, m)
	}
	if err == nil && choosesOnce(ctx) {
		err = f.a.canBeHad(ctx, repo, m)
	}
	if err != nil {
		return nil, late(ctx, err)
	}
	if o.Have == m.Digest {
		m.Bytes = nil
	}
	return m, nil
}

// late returns ErrUnavailable for what was not answered in time, else err.
func late(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), errSlow) {
		return fmt.Errorf("%w: %w: %w", registry.ErrUnavailable, errSlow, err)
	}
	return err
}

// canBeHad returns nil when all blobs of a manifest are here or at the origins, or can be read from the upstream:
// ErrManifestUnknown when one is nowhere, ErrUnavailable when that is not known. No bytes move.
func (a *Agent) canBeHad(ctx context.Context, repo string, m *registry.Manifest) error {
	key := repo + "@" + m.Digest.String() + a.callerOf(ctx, repo)
	if a.had.Has(key) {
		return nil
	}
	var doc struct {
		Config *v1.Descriptor  `json:"config"`
		Layers []v1.Descriptor `json:"layers"`
	}
	if json.Unmarshal(m.Bytes, &doc) != nil {
		return nil // some other kind of manifest, whose blobs nobody knows
	}
	blobs := doc.Layers
	if doc.Config != nil {
		blobs = append(blobs, *doc.Config)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(asksAtOnce)
	for _, b := range blobs {
		if len(b.Data) > 0 || len(b.URLs) > 0 || strings.Contains(b.MediaType, "nondistributable") || strings.Contains(b.MediaType, "foreign") {
			continue
		}
		g.Go(func() error {
			_, err := front{a}.StatBlob(gctx, repo, b.Digest)
			return err
		})
	}
	err := g.Wait()
	switch {
	case err == nil:
		a.had.Set(key, struct{}{}, ttlcache.DefaultTTL)
		return nil
	case errors.Is(err, registry.ErrBlobUnknown):
		return fmt.Errorf("%w: %s of %s, of which a blob can't be had: %v", registry.ErrManifestUnknown, m.Digest, repo, err)
	}
	return fmt.Errorf("%w: a blob of %s of %s: %w", registry.ErrUnavailable, m.Digest, repo, err)
}

// StatBlob implements registry.Blobs.
func (f front) StatBlob(ctx context.Context, repo string, d digest.Digest) (v1.Descriptor, error) {
	if !f.a.isUpstreams(repo) {
		if err := f.a.checkMember(ctx, repo, d); err != nil {
			return v1.Descriptor{}, err
		}
		return f.a.StatBlob(ctx, repo, d)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, headersWithin, errSlow)
	defer cancel()
	if err := f.a.checkMember(ctx, repo, d); err != nil {
		return v1.Descriptor{}, late(ctx, err)
	}
	if err := f.a.mayRead(repo, d, registry.Whole); err != nil {
		return v1.Descriptor{}, err
	}
	desc, err := f.a.StatBlob(ctx, repo, d)
	return desc, late(ctx, err)
}

// OpenBlob implements registry.Blobs. Headers are sent when the first bytes are there, so that what can't be had is a
// 503, and not a body without bytes.
func (f front) OpenBlob(ctx context.Context, repo string, d digest.Digest, hint registry.Range) (*registry.Content, error) {
	if !f.a.isUpstreams(repo) {
		if err := f.a.checkMember(ctx, repo, d); err != nil {
			return nil, err
		}
		return f.a.OpenBlob(ctx, repo, d, hint)
	}
	client := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	limit := time.AfterFunc(headersWithin, func() { cancel(errSlow) })
	err := f.a.checkMember(ctx, repo, d)
	if err == nil {
		err = f.a.mayRead(repo, d, hint)
	}
	var c *registry.Content
	tried := err == nil
	if tried {
		c, err = f.a.OpenBlob(ctx, repo, d, hint)
	}
	if err == nil && c.Body != nil {
		asked, _ := registry.AskedOf(ctx)
		body := &mirrored{under: c.Body, size: c.Size, ctx: ctx, failed: func(err error) { f.a.refuse(repo, d, cutBody{!asked.Ranged}, err) }}
		if err = body.begin(hint.Offset); err != nil {
			err = errors.Join(fmt.Errorf("%w: the first bytes of %s: %w", registry.ErrUnavailable, d, err), c.Close())
		}
		c.Body = body
	}
	if !limit.Stop() && err == nil {
		err = errors.Join(errSlow, c.Close())
	}
	if err != nil {
		err = late(ctx, err)
		if tried && client.Err() == nil {
			f.a.noteNothing(client, repo, d, err)
		}
		cancel(nil)
		return nil, err
	}
	end := c.Close
	c.Close = func() error {
		defer cancel(nil)
		return end()
	}
	return c, nil
}

// cutBlob is a blob as one registry's readers get it: what another one sends is no business of theirs.
type cutBlob struct {
	registry string
	digest   digest.Digest
}

// cutBody is a body that failed after its first byte.
type cutBody struct {
	// whole says that its reader had asked for the whole: it goes on at the byte that is missing, at the upstream where
	// the agent refuses that. Who reads in chunks at once has chosen the agent with its first one, and fails when a
	// later one is refused.
	whole bool
}

// mayRead returns ErrUnavailable for a blob that is refused.
func (a *Agent) mayRead(repo string, d digest.Digest, hint registry.Range) error {
	if cut := a.refused.Get(cutBlob{registryOf(repo), d}); cut != nil && (cut.Value().whole || hint.Offset == 0) {
		return &registry.RetryError{Err: fmt.Errorf("%w: blob %s: %w", registry.ErrUnavailable, d, errRefused), After: refuseFor}
	}
	return nil
}

// refuse makes the runtime whose reading failed go on elsewhere, if it can.
func (a *Agent) refuse(repo string, d digest.Digest, cut cutBody, err error) {
	a.refused.Set(cutBlob{registryOf(repo), d}, cut, ttlcache.DefaultTTL)
	a.had.DeleteAll()
	a.log.Info("a blob is refused for a moment: it could not be read to its end", "repository", repo, "digest", d, "for", refuseFor, "error", err)
}

// noteNothing notes that not a byte of a blob could be had. Who names the registry in the path goes on elsewhere for a
// whole image or not at all, so for a moment it gets no manifest that has it.
func (a *Agent) noteNothing(ctx context.Context, repo string, d digest.Digest, err error) {
	if choosesOnce(ctx) && errors.Is(err, registry.ErrUnavailable) {
		a.refuse(repo, d, cutBody{whole: true}, err)
		return
	}
	a.had.DeleteAll()
}

// mirrored is the body of an upstream's blob. It has its first bytes before it is handed out, and tells of a read that
// failed for another reason than its reader's end. Seek moves nothing, so that what is below it is read in order by who
// reads in order.
type mirrored struct {
	under  io.ReadSeeker
	size   int64
	ctx    context.Context
	failed func(error)

	pos, at int64  // of the reader; of under
	first   []byte // read ahead, to be returned at firstAt
	firstAt int64
}

// begin reads the first bytes at off.
func (m *mirrored) begin(off int64) error {
	if off < 0 || off >= m.size {
		return nil // a suffix, or a range that the blob does not have
	}
	if off > 0 {
		if _, err := m.under.Seek(off, io.SeekStart); err != nil {
			return err
		}
	}
	first := make([]byte, 512)
	n, err := m.under.Read(first)
	if n == 0 && err != nil {
		return err
	}
	m.first, m.firstAt, m.at = first[:n], off, off+int64(n)
	return nil
}

// Read implements io.Reader.
func (m *mirrored) Read(b []byte) (int, error) {
	if m.pos >= m.size {
		return 0, io.EOF
	}
	if len(m.first) > 0 && m.pos == m.firstAt {
		n := copy(b, m.first)
		m.first, m.firstAt, m.pos = m.first[n:], m.firstAt+int64(n), m.pos+int64(n)
		return n, nil
	}
	if m.pos != m.at {
		if _, err := m.under.Seek(m.pos, io.SeekStart); err != nil {
			return 0, err
		}
		m.at = m.pos
	}
	n, err := m.under.Read(b)
	m.pos, m.at = m.pos+int64(n), m.at+int64(n)
	if err != nil && !errors.Is(err, io.EOF) && m.ctx.Err() == nil {
		m.failed(err)
	}
	return n, err
}

// Seek implements io.Seeker.
func (m *mirrored) Seek(off int64, whence int) (int64, error) {
	off, err := blob.Seek(off, whence, m.pos, m.size)
	if err == nil {
		m.pos = off
	}
	return off, err
}

// upstreamsKey is where the cache keeps what build-index said last about upstreams.
var upstreamsKey = resolutionKey("", "upstreams")

// watchUpstreams keeps what the agent knows of upstreams as build-index says, and on disk, so that an agent that starts
// while build-index is away is a mirror all the same.
func (a *Agent) watchUpstreams(ctx context.Context) error {
	known, err := a.store.Name(upstreamsKey)
	if err != nil {
		known = nil // nothing was kept
	}
	return a.namer.Watch(ctx, a.index, a.log, known, a.keepUpstreams)
}

// keepUpstreams puts what build-index said into the cache. Where that fails nothing is left there: what was public the
// last time may be private now, and an agent that knows nothing takes everything for private.
func (a *Agent) keepUpstreams(said []byte) error {
	if err := a.store.PutName(upstreamsKey, said); err != nil {
		return errors.Join(err, a.store.DeleteName(upstreamsKey))
	}
	return nil
}
