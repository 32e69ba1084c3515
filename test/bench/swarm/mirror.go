package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/deploy/devcluster"
	"kraken/test/bench/report"
)

const (
	upstreamPort = 5000
	upstreamRepo = "library/bench"
	// think is how long the upstream takes for the header of an answer: what its network and its storage take
	// elsewhere.
	think = 20 * time.Millisecond
)

// registry is the upstream: it serves the files of a folder as blobs and manifests, and counts.
type registry struct {
	dir string
	l   net.Listener
	srv *http.Server
	err chan error

	mu   sync.Mutex
	gets map[string]int // by digest: reads from the first byte on
	head int            // of manifests
	tags map[string]digest.Digest
}

// serveUpstream starts the upstream of a shaped cluster.
func (c *cluster) serveUpstream(host devcluster.Host) error {
	r := &registry{
		dir: filepath.Join(c.plan.Dir, "upstream"), err: make(chan error, 1), gets: map[string]int{}, tags: map[string]digest.Digest{},
	}
	if err := os.MkdirAll(r.dir, 0o755); err != nil {
		return err
	}
	var err error
	if r.l, err = host.Listen(upstreamPort); err != nil {
		return err
	}
	r.srv = &http.Server{Handler: r, ReadHeaderTimeout: time.Minute}
	go func() { r.err <- r.srv.Serve(r.l) }()
	c.upstream = r
	return nil
}

func (r *registry) close() error {
	if r == nil {
		return nil
	}
	err := r.srv.Close()
	if serr := <-r.err; !errors.Is(serr, http.ErrServerClosed) {
		err = errors.Join(err, serr)
	}
	return err
}

// repository is what the cluster calls the upstream's.
func (r *registry) repository() string {
	return strings.Replace(r.l.Addr().String(), ":", "_", 1) + "/" + upstreamRepo
}

// ServeHTTP implements http.Handler.
func (r *registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	time.Sleep(think)
	rest, ok := strings.CutPrefix(req.URL.Path, "/v2/"+upstreamRepo+"/")
	kind, ref, _ := strings.Cut(rest, "/")
	if !ok || ref == "" {
		w.WriteHeader(http.StatusOK) // GET /v2/
		return
	}
	r.mu.Lock()
	d, tagged := r.tags[ref]
	r.mu.Unlock()
	if !tagged {
		d = digest.Digest(ref)
	}
	f, err := os.Open(filepath.Join(r.dir, d.Encoded()))
	if err != nil {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	defer f.Close()
	w.Header().Set("Docker-Content-Digest", d.String())
	w.Header().Set("Content-Type", "application/octet-stream")
	if kind == "manifests" {
		w.Header().Set("Content-Type", v1.MediaTypeImageManifest)
	}
	from := req.Header.Get("Range")
	r.mu.Lock()
	switch {
	case req.Method == http.MethodGet && (from == "" || strings.HasPrefix(from, "bytes=0-")):
		r.gets[d.String()]++
	case req.Method == http.MethodHead && kind == "manifests":
		r.head++
	}
	r.mu.Unlock()
	http.ServeContent(w, req, "", time.Time{}, f)
}

// add makes a blob of size bytes at the upstream.
func (r *registry) add(size int64) (blobOf, error) {
	b, err := newBlob(size)
	if err != nil {
		return b, err
	}
	return b, writeBlob(filepath.Join(r.dir, b.digest.Encoded()), b)
}

// drop removes a blob, which nobody is to ask for again.
func (r *registry) drop(b blobOf) error { return os.Remove(filepath.Join(r.dir, b.digest.Encoded())) }

// image makes an image of layers at the upstream.
func (r *registry) image(tag string, sizes ...int64) (layers []blobOf, manifest digest.Digest, err error) {
	m := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest}
	for _, size := range append(sizes, 1000) {
		b, err := r.add(size)
		if err != nil {
			return nil, "", err
		}
		layers = append(layers, b)
		m.Layers = append(m.Layers, v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: b.digest, Size: b.size})
	}
	m.Config = m.Layers[len(m.Layers)-1]
	m.Config.MediaType = v1.MediaTypeImageConfig
	m.Layers = m.Layers[:len(m.Layers)-1]
	raw, err := json.Marshal(m)
	if err != nil {
		return nil, "", err
	}
	manifest = digest.FromBytes(raw)
	r.mu.Lock()
	r.tags[tag] = manifest
	r.mu.Unlock()
	return layers, manifest, os.WriteFile(filepath.Join(r.dir, manifest.Encoded()), raw, 0o644)
}

// reads returns how often a blob or manifest was read from its begin.
func (r *registry) reads(d digest.Digest) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.gets[d.String()]
}

func (r *registry) heads() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.head
}

// pullUpstream reads a blob of the upstream from an agent.
func (c *cluster) pullUpstream(ctx context.Context, a *devcluster.Component, b blobOf) (pulled, error) {
	hc := a.Host().Client()
	defer hc.CloseIdleConnections()
	return get(ctx, hc, c.plan.URL(a)+"/v2/"+c.upstream.repository()+"/blobs/"+b.digest.String(), b.digest)
}

// pullDirect reads a blob from the upstream on an agent's node.
func (c *cluster) pullDirect(ctx context.Context, a *devcluster.Component, b blobOf) (pulled, error) {
	hc := a.Host().Client()
	defer hc.CloseIdleConnections()
	return get(ctx, hc, "http://"+c.upstream.l.Addr().String()+"/v2/"+upstreamRepo+"/blobs/"+b.digest.String(), b.digest)
}

// mirrored is a cluster that mirrors an upstream, for the rows about that.
func (b *bench) mirrored(ctx context.Context, o options, fn func(c *cluster) error) error {
	o.shaped, o.upstream = true, true
	c, err := b.newCluster(ctx, o)
	if err != nil {
		return err
	}
	return errors.Join(fn(c), c.close())
}

// mirrorCrowd is n agents that want a blob at the same moment that nobody in the cluster has.
func mirrorCrowd(n, mbit int, size int64, repeat int) func(*bench, context.Context) error {
	return func(b *bench, ctx context.Context) error {
		return b.mirrored(ctx, options{agents: n, mbit: mbit}, func(c *cluster) error {
			limit := bound(size, mbit, 1<<20)
			var median, last, copies, busy []float64
			most := 0
			for range min(b.repeat, repeat) {
				blob, err := c.upstream.add(size)
				if err != nil {
					return err
				}
				r, err := c.race(ctx, mbit, size, func(ctx context.Context, i int) (float64, error) {
					p, err := c.pullUpstream(ctx, c.agents[i], blob)
					return p.took.Seconds(), err
				}, nil)
				if err != nil {
					return err
				}
				median, last = append(median, r.median()/limit), append(last, r.last()/limit)
				copies, busy = append(copies, r.copies), append(busy, r.busy)
				most = max(most, c.upstream.reads(blob.digest))
				if err := errors.Join(b.draw(fmt.Sprintf("mirror-%d", n), r.s, c.net, size), c.upstream.drop(blob)); err != nil {
					return err
				}
			}
			params := map[string]any{"agents": n, "mbit": mbit, "mib": size / mib}
			b.add(valid(report.AtMost("mirror crowd, last agent", params, report.Median(last), "x bound", 1.35,
				map[string]any{"median": report.Median(median), "origin_copies": report.Median(copies), "bound_s": limit}), slices.Max(busy)),
				report.AtMost("mirror crowd, reads at the upstream", params, float64(most), "GETs", 1, nil))
			return nil
		})
	}
}

// mirrorFirst is the first pull of a blob by one node, beside a direct one on the same links.
func mirrorFirst(mbit int, size int64) func(*bench, context.Context) error {
	return func(b *bench, ctx context.Context) error {
		return b.mirrored(ctx, options{agents: 1}, func(c *cluster) (err error) {
			if err := c.net.Shape(mbit, c.net.Nodes[1:]...); err != nil {
				return err
			}
			a := c.agents[0]
			var direct, through [2][]float64 // first byte and whole
			both := func(size int64, k int) error {
				layers, manifest, err := c.upstream.image(fmt.Sprintf("v%d", len(direct[0])), size)
				if err != nil {
					return err
				}
				blob := layers[0]
				if err := c.readManifest(ctx, a, manifest.String()); err != nil { // as each runtime does first
					return err
				}
				p, err := c.pullDirect(ctx, a, blob)
				if err != nil {
					return err
				}
				q, err := c.pullUpstream(ctx, a, blob)
				if err != nil {
					return err
				}
				direct[k] = append(direct[k], [2]float64{p.first.Seconds(), p.took.Seconds()}[k])
				through[k] = append(through[k], [2]float64{q.first.Seconds(), q.took.Seconds()}[k])
				return c.upstream.drop(blob)
			}
			for range 15 {
				if err := both(8*mib, 0); err != nil {
					return err
				}
			}
			if err := both(size, 1); err != nil {
				return err
			}
			params := map[string]any{"mbit": mbit, "mib": size / mib}
			rows := []struct {
				name string
				most float64
			}{{"mirror first pull, first byte", 1.2}, {"mirror first pull, whole", 1.1}}
			for k, row := range rows {
				d, t := report.Median(direct[k]), report.Median(through[k])
				b.add(report.AtMost(row.name, params, t/d, "x direct", row.most, map[string]any{"direct_s": d, "through_s": t}))
			}
			return nil
		})
	}
}

// mirrorImage is agents that pull one image, all at once, and once more.
func mirrorImage(n int) func(*bench, context.Context) error {
	return func(b *bench, ctx context.Context) error {
		return b.mirrored(ctx, options{agents: n}, func(c *cluster) error {
			var sizes []int64
			for i := range 10 {
				sizes = append(sizes, int64(1+i)*mib/2)
			}
			layers, manifest, err := c.upstream.image("latest", sizes...)
			if err != nil {
				return err
			}
			began := time.Now()
			if err := c.pullImages(ctx, layers); err != nil {
				return err
			}
			took := time.Since(began).Seconds()
			heads := c.upstream.heads()
			if err := c.pullImages(ctx, layers); err != nil {
				return err
			}
			most, least := 0, 1
			for _, l := range layers {
				most, least = max(most, c.upstream.reads(l.digest)), min(least, c.upstream.reads(l.digest))
			}
			params := map[string]any{"agents": n, "layers": len(sizes)}
			b.add(report.AtMost("mirror image, reads of a blob", params, float64(most), "GETs", 1, map[string]any{"least": least, "took_s": took}),
				report.AtMost("mirror image, reads of the manifest", params, float64(c.upstream.reads(manifest)), "GETs", 1, nil),
				report.AtMost("mirror image, second pull", params, float64(c.upstream.heads()-heads), "HEADs", 1, nil))
			return nil
		})
	}
}

// readManifest reads a manifest of the upstream from an agent.
func (c *cluster) readManifest(ctx context.Context, a *devcluster.Component, ref string) error {
	hc := a.Host().Client()
	defer hc.CloseIdleConnections()
	_, err := get(ctx, hc, c.plan.URL(a)+"/v2/"+c.upstream.repository()+"/manifests/"+ref, "")
	return err
}

// pullImages has all agents pull the image at once: manifest, then its blobs.
func (c *cluster) pullImages(ctx context.Context, layers []blobOf) error {
	errs := make([]error, len(c.agents))
	var wg sync.WaitGroup
	for i, a := range c.agents {
		wg.Go(func() {
			if errs[i] = c.readManifest(ctx, a, "latest"); errs[i] != nil {
				return
			}
			hc := a.Host().Client()
			defer hc.CloseIdleConnections()
			base := c.plan.URL(a) + "/v2/" + c.upstream.repository()
			for _, l := range layers {
				if _, err := get(ctx, hc, base+"/blobs/"+l.digest.String(), l.digest); err != nil {
					errs[i] = errors.Join(errs[i], err)
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
