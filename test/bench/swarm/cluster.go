package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/deploy/devcluster"
	"kraken/test/netns"
)

// machine is the CPU time of the machine: used, and in all.
func machine() (used, total float64) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0
	}
	for i, f := range strings.Fields(strings.SplitN(string(b), "\n", 2)[0])[1:9] {
		v, _ := strconv.ParseFloat(f, 64)
		total += v
		if i != 3 && i != 4 { // idle, iowait
			used += v
		}
	}
	return used, total
}

// options of a cluster.
type options struct {
	agents int
	shaped bool
	tls    bool                // everywhere
	mbit   int                 // what agents are told of their link; 0: nothing
	env    map[string][]string // by role
	// upstream makes one, on a node of its own, which the cluster mirrors; where shaped.
	upstream bool
	config   map[string]map[string]any // more keys, by role
}

// cluster is one origin, the other roles, and agents; each agent and the origin in a namespace of its own, or all on
// loopback.
type cluster struct {
	plan   *devcluster.Cluster
	net    *netns.Network // nil on loopback
	origin *devcluster.Component
	agents []*devcluster.Component

	upstream *registry // nil without one
}

// newCluster starts a cluster. close ends it.
func (b *bench) newCluster(ctx context.Context, o options) (_ *cluster, err error) {
	// Beside the results and not in /tmp, which may be memory.
	if err := os.MkdirAll(b.out, 0o755); err != nil {
		return nil, err
	}
	// A name that go's ./... leaves alone.
	dir, err := os.MkdirTemp(b.out, ".state-")
	if err != nil {
		return nil, err
	}
	c := &cluster{plan: &devcluster.Cluster{Dir: dir}}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.close())
		}
	}()
	described := devcluster.Options{
		Dir: dir, Bin: b.bin, Origins: 1, Agents: o.agents, FreePorts: !o.shaped, FolderBucket: true, Bound: true, MutualTLS: o.tls,
		Env: o.env, Config: o.keys(),
	}
	if o.shaped {
		if described.Hosts, err = c.connect(o); err != nil {
			return nil, err
		}
		if o.upstream {
			at := c.net.Nodes[len(c.net.Nodes)-1].Host
			if err := c.serveUpstream(at); err != nil {
				return nil, err
			}
			mirrored := map[string]any{"registries": []any{map[string]any{"registry": c.upstream.l.Addr().String(), "plain_http": true}}}
			described.Config["origin"]["upstreams"] = mirrored
			described.Config["build-index"] = map[string]any{"upstreams": mirrored}
		}
	}
	plan, err := devcluster.Plan(described)
	if err != nil {
		return nil, err
	}
	c.plan, c.origin, c.agents = plan, plan.Role("origin")[0], plan.Role("agent")
	if err := plan.Up(ctx, io.Discard); err != nil {
		return nil, err
	}
	return c, nil
}

// keys returns what a bench has otherwise than a development cluster, by role: no peers but Kraken's, and o's own keys.
func (o options) keys() map[string]map[string]any {
	own := func() map[string]any { return map[string]any{"stock_peers": false} }
	out := map[string]map[string]any{"origin": {"peer": own()}, "tracker": own(), "agent": {"peer": own()}}
	if o.mbit > 0 {
		out["agent"]["peer"] = map[string]any{"stock_peers": false, "link_rate": fmt.Sprintf("%dMbit/s", o.mbit)}
	}
	for role, keys := range o.config {
		if out[role] == nil {
			out[role] = map[string]any{}
		}
		maps.Copy(out[role], keys)
	}
	return out
}

// connect makes the network: a node for each agent and the origin, by their ids, one for the other roles, and one for
// an upstream where there is one.
func (c *cluster) connect(o options) (hosts map[string]devcluster.Host, err error) {
	names := []string{"core", "origin-01"}
	for i := range o.agents {
		names = append(names, fmt.Sprintf("agent-%02d", i+1))
	}
	if o.upstream {
		names = append(names, "upstream")
	}
	if c.net, err = netns.New(fmt.Sprintf("kb%d", os.Getpid()), names...); err != nil {
		return nil, err
	}
	hosts = map[string]devcluster.Host{}
	for _, x := range c.net.Nodes {
		if x.Name != "upstream" {
			hosts["kraken-"+x.Name] = x.Host
		}
	}
	for _, role := range []string{"tracker", "build-index", "proxy"} {
		hosts[role] = c.net.Nodes[0].Host
	}
	return hosts, nil
}

// only is the one component of a role.
func (c *cluster) only(role string) *devcluster.Component { return c.plan.Role(role)[0] }

// close ends the cluster, which has nothing that is worth a drain, and removes all that it made.
func (c *cluster) close() error {
	err := errors.Join(c.upstream.close(), c.plan.KillAll(context.Background()))
	if c.net != nil {
		err = errors.Join(err, c.net.Close())
	}
	return errors.Join(err, os.RemoveAll(c.plan.Dir))
}

// renew ends the agents, forgets what they cached, and starts them again.
func (c *cluster) renew(ctx context.Context) error {
	for _, a := range c.agents {
		if err := c.plan.Stop(ctx, a.Name); err != nil {
			return err
		}
		if err := errors.Join(c.plan.Wipe(a.Name), c.plan.Start(ctx, a.Name)); err != nil {
			return err
		}
	}
	return nil
}

func eventually(ctx context.Context, limit time.Duration, what string, fn func() (bool, error)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not within %s: %s", limit, what))
	defer cancel()
	for {
		if ok, err := fn(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

const repository = "bench/blob"

// blobOf is a blob of random bytes that can be read again from its seed.
type blobOf struct {
	digest digest.Digest
	size   int64
	seed   [32]byte
}

func (b blobOf) reader() io.Reader { return io.LimitReader(rand.NewChaCha8(b.seed), b.size) }

func newBlob(size int64) (blobOf, error) {
	b := blobOf{size: size}
	for i := range b.seed {
		b.seed[i] = byte(rand.Uint32())
	}
	h := sha256.New()
	_, err := io.Copy(h, b.reader())
	b.digest = digest.NewDigest(digest.SHA256, h)
	return b, err
}

// client is a client at a component's host, with the certificate of an origin where the cluster has TLS.
func (c *cluster) client(at *devcluster.Component) (*http.Client, error) {
	hc := at.Host().Client()
	if !c.plan.MutualTLS {
		return hc, nil
	}
	f := c.plan.Certificate(c.origin.ID())
	pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(f.CA)
	if err != nil {
		return nil, err
	}
	cfg := &tls.Config{RootCAs: x509.NewCertPool(), Certificates: []tls.Certificate{pair}}
	cfg.RootCAs.AppendCertsFromPEM(ca)
	hc.Transport.(*http.Transport).TLSClientConfig = cfg
	return hc, nil
}

// push sends a new blob through the proxy and waits until it can be swarmed and nothing is left to write back.
func (c *cluster) push(ctx context.Context, size int64) (blobOf, error) {
	b, err := newBlob(size)
	if err != nil {
		return b, err
	}
	if err := c.pushBlob(ctx, b.digest, size, b.reader()); err != nil {
		return b, err
	}
	return b, c.settled(ctx, b.digest)
}

func (c *cluster) pushBlob(ctx context.Context, d digest.Digest, size int64, r io.Reader) error {
	proxy := c.only("proxy")
	hc, err := c.client(proxy)
	if err != nil {
		return err
	}
	defer hc.CloseIdleConnections()
	return pushTo(ctx, hc, c.plan.URL(proxy), d, size, r)
}

func pushTo(ctx context.Context, hc *http.Client, base string, d digest.Digest, size int64, r io.Reader) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, base+"/v2/"+repository+"/blobs/uploads/?digest="+url.QueryEscape(d.String()), r)
	if err != nil {
		return err
	}
	req.ContentLength = size
	req.Header.Set("Content-Type", "application/octet-stream")
	return expect(hc, req, http.StatusCreated)
}

func expect(hc *http.Client, req *http.Request, status int) error {
	resp, err := hc.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	if err == nil && resp.StatusCode != status {
		err = fmt.Errorf("%s %s: %s: %s", req.Method, req.URL.Path, resp.Status, text)
	}
	return err
}

// settled waits until the origin has the metainfo of a blob and has written everything back.
func (c *cluster) settled(ctx context.Context, d digest.Digest) error {
	hc, err := c.client(c.origin)
	if err != nil {
		return err
	}
	defer hc.CloseIdleConnections()
	return eventually(ctx, 2*time.Minute, "blob "+d.String()+" has metainfo and is written back", func() (bool, error) {
		resp, err := hc.Get(c.plan.URL(c.origin) + "/v2/" + repository + "/_kraken/metainfo/" + d.String())
		if err != nil {
			return false, err
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return false, nil
		}
		left, err := c.plan.Owed(ctx, c.origin)
		return left == 0, err
	})
}

// pulled is what a client saw.
type pulled struct {
	first, took time.Duration
	n           int64
}

// pull reads a blob from an agent as a runtime would; its bytes are checked.
func (c *cluster) pull(ctx context.Context, a *devcluster.Component, b blobOf) (pulled, error) {
	return get(ctx, a.Host().Client(), c.plan.URL(a)+"/v2/"+repository+"/blobs/"+b.digest.String(), b.digest)
}

// buffers are of clients: one for each pull costs as much as the agent does when that is of 10 KiB.
var buffers = sync.Pool{New: func() any { b := make([]byte, 256<<10); return &b }}

// get reads a URL. An empty digest is not checked.
func get(ctx context.Context, hc *http.Client, from string, d digest.Digest) (p pulled, err error) {
	began := time.Now()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
	if err != nil {
		return p, err
	}
	resp, err := hc.Do(req)
	if err != nil {
		return p, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return p, fmt.Errorf("GET %s: %s", from, resp.Status)
	}
	var into io.Writer = io.Discard
	h := digest.SHA256.Hash()
	if d != "" {
		into = h
	}
	pooled := buffers.Get().(*[]byte)
	defer buffers.Put(pooled)
	buf := *pooled
	for {
		n, err := resp.Body.Read(buf)
		if n > 0 && p.n == 0 {
			p.first = time.Since(began)
		}
		p.n += int64(n)
		into.Write(buf[:n])
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return p, fmt.Errorf("GET %s: after %d bytes: %w", from, p.n, err)
		}
	}
	p.took = time.Since(began)
	if d != "" && digest.NewDigest(digest.SHA256, h) != d {
		return p, fmt.Errorf("GET %s: wrong bytes", from)
	}
	return p, nil
}
