// Package cluster runs every role of a cluster in one process, on loopback with real disks, a real bucket server and
// real BitTorrent, for tests.
package cluster

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kraken/agent"
	"kraken/buildindex"
	"kraken/deploy/devcluster"
	"kraken/origin"
	"kraken/proto/cluster"
	"kraken/proto/config"
	"kraken/proto/registry"
	"kraken/proto/role"
	"kraken/proto/transport"
	"kraken/proxy"
	"kraken/test/testfs"
	"kraken/tracker"
)

// Role is what runs.
type Role interface {
	Run(ctx context.Context) error
}

// Part is one role that can be stopped and started again on the same disk and address.
type Part struct {
	t    *testing.T
	name string
	make func() (Role, error)
	role Role

	cancel context.CancelFunc
	done   chan error
}

// Start starts the part.
func (p *Part) Start() {
	p.t.Helper()
	role, err := p.make()
	if err != nil {
		p.t.Fatalf("start %s: %v", p.name, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.role, p.cancel, p.done = role, cancel, make(chan error, 1)
	go func() { p.done <- role.Run(ctx) }()
}

// Stop ends the part gracefully and waits. A stopped part is left alone.
func (p *Part) Stop() {
	p.t.Helper()
	if p.cancel == nil {
		return
	}
	p.cancel()
	p.cancel = nil
	select {
	case err := <-p.done:
		if err != nil {
			p.t.Errorf("%s ended with: %v", p.name, err)
		}
	case <-time.After(45 * time.Second):
		p.t.Errorf("%s does not stop", p.name)
	}
}

// ManifestTTL is the agents'.
const ManifestTTL = time.Second

// Cluster is a whole cluster.
type Cluster struct {
	t          *testing.T
	plan       *devcluster.Cluster
	log        *slog.Logger
	Bucket     *testfs.Server
	Origins    []*Part
	Tracker    *Part
	BuildIndex *Part
	ProxyPart  *Part
	AgentParts []*Part

	Proxy, OtherProxy *registry.Client
	ProxyURL          string // of the first
	OtherProxyURL     string
	AgentURLs         []string
	OriginURLs        []string
	Agents            []*registry.Client

	// Listeners are the addresses of every part but testfs, admin listeners apart.
	Listeners []string
}

// New starts a cluster with three origins and n agents, on plain HTTP. It ends with the test.
func New(t *testing.T, n int) *Cluster {
	t.Helper()
	return start(t, 3, n, false, nil)
}

// NewMirror is NewOrigins with a cluster that mirrors registries, as the section `upstreams` says.
func NewMirror(t *testing.T, origins, agents int, upstreams map[string]any) *Cluster {
	t.Helper()
	return start(t, origins, agents, false, upstreams)
}

// NewSmallMirror is NewMirror with disks that hold little: old blobs make room for new ones.
func NewSmallMirror(t *testing.T, origins, agents int, upstreams map[string]any, capacity string) *Cluster {
	t.Helper()
	return startWith(t, origins, agents, false, func(settings map[string]map[string]any) {
		settings["origin"]["upstreams"], settings["build-index"]["upstreams"] = upstreams, upstreams
		settings["origin"]["capacity"], settings["agent"]["cache"] = capacity, map[string]any{"capacity": capacity}
	})
}

// NewMutualTLSMirror is NewMirror with a cluster that takes only its own nodes, on every listener.
func NewMutualTLSMirror(t *testing.T, origins, agents int, upstreams map[string]any) *Cluster {
	t.Helper()
	return start(t, origins, agents, true, upstreams)
}

// NewOrigins is New with another number of origins.
func NewOrigins(t *testing.T, origins, agents int) *Cluster {
	t.Helper()
	return start(t, origins, agents, false, nil)
}

// NewMutualTLS is New with a cluster that takes only its own nodes, on every listener.
func NewMutualTLS(t *testing.T, n int) *Cluster {
	t.Helper()
	return start(t, 3, n, true, nil)
}

func start(t *testing.T, origins, n int, mutualTLS bool, upstreams map[string]any) *Cluster {
	t.Helper()
	return startWith(t, origins, n, mutualTLS, func(settings map[string]map[string]any) {
		if upstreams != nil {
			settings["origin"]["upstreams"], settings["build-index"]["upstreams"] = upstreams, upstreams
		}
	})
}

// startWith runs what deploy/devcluster describes, with a second proxy, in this process. change changes the settings.
func startWith(t *testing.T, origins, n int, mutualTLS bool, change func(settings map[string]map[string]any)) *Cluster {
	t.Helper()
	dir := t.TempDir()
	cfg := settings(dir, n, mutualTLS)
	change(cfg)
	plan, err := devcluster.Plan(devcluster.Options{
		Dir: dir, Bin: dir, Origins: origins, Agents: n, Proxies: 2, FreePorts: true, MutualTLS: mutualTLS, Config: cfg,
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := plan.Write(); err != nil {
		t.Fatal(err)
	}
	c := &Cluster{t: t, plan: plan, log: slog.New(slog.DiscardHandler)}
	if testing.Verbose() {
		c.log = slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelWarn}))
	}
	var all []*Part
	for _, comp := range plan.Components {
		all = append(all, c.add(comp))
	}
	for _, p := range all {
		p.Start()
	}
	Eventually(t, time.Minute, func() error { return c.owed("build-index") }) // until then what it lacks is 503
	return c
}

// settings are what tests have otherwise than a development cluster: little patience at the end, agents that ask again
// soon, proxies that go on with each other's uploads and, with mutual TLS, take nobody without a certificate.
func settings(dir string, agents int, mutualTLS bool) map[string]map[string]any {
	soon := func() map[string]any { return map[string]any{"drain_timeout": "5s"} }
	out := map[string]map[string]any{}
	for _, role := range []string{"origin", "tracker", "build-index", "proxy", "agent"} {
		out[role] = map[string]any{"server": soon(), "admin": soon()}
	}
	out["agent"]["manifest_ttl"] = ManifestTTL.String()
	out["agent"]["docker_hub"] = map[string]any{"listen": "127.0.0.1:0"}
	out["proxy"]["upload_key_file"] = filepath.Join(dir, "upload.key")
	if !mutualTLS {
		return out
	}
	ids := []string{"proxy-01", "proxy-02"}
	for i := range agents {
		ids = append(ids, fmt.Sprintf("agent-%02d", i+1))
	}
	for _, id := range ids {
		f := devcluster.CertificateIn(dir, id)
		out["kraken-"+id] = map[string]any{"server": map[string]any{"tls": map[string]any{"cert": f.Cert, "key": f.Key, "client_ca": f.CA}}}
	}
	return out
}

// add makes the part of one component, and what tests know it by.
func (c *Cluster) add(comp *devcluster.Component) *Part {
	deps := func() role.Deps {
		return role.Deps{Log: c.log.With("part", comp.ID()), Registry: prometheus.NewRegistry()}
	}
	file, url := c.plan.ConfigPath(comp), c.url(comp)
	if comp.Role != "testfs" {
		c.Listeners = append(c.Listeners, comp.Addr)
	}
	if comp.Peer != "" {
		c.Listeners = append(c.Listeners, comp.Peer)
	}
	var p *Part
	switch comp.Role {
	case "testfs":
		return c.part(comp.ID(), func() (Role, error) {
			s, err := testfs.New(testfs.Config{Listen: comp.Addr, Dir: c.plan.StateDir(comp), Log: deps().Log})
			c.Bucket = s
			return s, err
		})
	case "origin":
		p = c.part(comp.ID(), func() (Role, error) { return open(file, deps(), origin.New) })
		c.Origins, c.OriginURLs = append(c.Origins, p), append(c.OriginURLs, url)
	case "tracker":
		p = c.part(comp.ID(), func() (Role, error) { return open(file, deps(), tracker.New) })
		c.Tracker = p
	case "build-index":
		p = c.part(comp.ID(), func() (Role, error) { return open(file, deps(), buildindex.New) })
		c.BuildIndex = p
	case "proxy":
		p = c.part(comp.ID(), func() (Role, error) { return open(file, deps(), proxy.New) })
		if c.Proxy == nil {
			c.ProxyPart, c.Proxy, c.ProxyURL = p, c.client(url), url
		} else {
			c.OtherProxy, c.OtherProxyURL = c.client(url), url
		}
	case "agent":
		p = c.part(comp.ID(), func() (Role, error) { return open(file, deps(), agent.New) })
		c.AgentParts, c.Agents, c.AgentURLs = append(c.AgentParts, p), append(c.Agents, c.client(url)), append(c.AgentURLs, url)
	}
	return p
}

// open opens a role with its configuration file.
func open[C any, R Role](file string, deps role.Deps, with func(C, role.Deps) (R, error)) (Role, error) {
	var cfg C
	if err := config.Load(file, &cfg); err != nil {
		return nil, err
	}
	return with(cfg, deps)
}

// url is a component's main listener. With mutual TLS all have it here, also agents.
func (c *Cluster) url(comp *devcluster.Component) string {
	if c.plan.MutualTLS && comp.Role != "testfs" {
		return "https://" + comp.Addr
	}
	return "http://" + comp.Addr
}

// owed says what some parts have not written to the bucket, or, a build-index, not restored yet.
func (c *Cluster) owed(names ...string) error {
	for _, name := range names {
		n, err := c.plan.Owed(c.t.Context(), c.find(name))
		if err != nil {
			return err
		}
		if n > 0 {
			return fmt.Errorf("%s owes %d blobs and names", name, n)
		}
	}
	return nil
}

// StateDir is a part's disk.
func (c *Cluster) StateDir(name string) string { return c.plan.StateDir(c.find(name)) }

// Wipe empties a part's disk. It must not run.
func (c *Cluster) Wipe(name string) {
	c.t.Helper()
	if err := os.RemoveAll(c.StateDir(name)); err != nil {
		c.t.Fatal(err)
	}
	if err := os.MkdirAll(c.StateDir(name), 0o755); err != nil {
		c.t.Fatal(err)
	}
}

// Admin is the address of a part's admin listener; the bucket has none.
func (c *Cluster) Admin(name string) string { return c.find(name).Admin }

// DockerHub is the URL of an agent's listener that stands for docker.io.
func (c *Cluster) DockerHub(i int) string {
	return "http://" + c.AgentParts[i].role.(*agent.Agent).DockerHubAddr()
}

// find is a component by its id; of build-index and tracker, of which there is one, the role will do.
func (c *Cluster) find(name string) *devcluster.Component {
	c.t.Helper()
	if only := c.plan.Role(name); len(only) == 1 {
		return only[0]
	}
	comp, err := c.plan.Find(name)
	if err != nil {
		c.t.Fatal(err)
	}
	return comp
}

func (c *Cluster) part(name string, mk func() (Role, error)) *Part {
	p := &Part{t: c.t, name: name, make: mk}
	c.t.Cleanup(p.Stop)
	return p
}

// client is a client of the specification, with a certificate of one where the cluster has mutual TLS.
func (c *Cluster) client(url string) *registry.Client {
	c.t.Helper()
	var cfg transport.ClientConfig
	if c.plan.MutualTLS {
		f, err := c.plan.Issue("client-01")
		if err != nil {
			c.t.Fatal(err)
		}
		cfg = transport.ClientConfig{CA: f.CA, Cert: f.Cert, Key: f.Key}
	}
	hc, err := transport.NewClient(cfg, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(hc.CloseIdleConnections)
	rc, err := registry.NewClient(url, hc)
	if err != nil {
		c.t.Fatal(err)
	}
	return rc
}

// index is a client of a build-index without TLS.
func (c *Cluster) index(t *testing.T) *cluster.IndexClient {
	t.Helper()
	x, err := cluster.NewIndexClient("http://"+c.find("build-index").Addr, http.DefaultClient)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// originClient talks to an origin with the certificate of an id, whose role is what stands before the number in it.
func (c *Cluster) originClient(t *testing.T, url, id string) *cluster.OriginClient {
	t.Helper()
	f, err := c.plan.Issue(id)
	if err != nil {
		t.Fatal(err)
	}
	hc, err := transport.NewClient(transport.ClientConfig{CA: f.CA, Cert: f.Cert, Key: f.Key}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hc.CloseIdleConnections)
	o, err := cluster.NewOriginClient(url, hc)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// originClient talks to an origin of a cluster without TLS as other origins do.
func originClient(t *testing.T, url string) *cluster.OriginClient {
	t.Helper()
	hc, err := transport.NewClient(transport.ClientConfig{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hc.CloseIdleConnections)
	c, err := cluster.NewOriginClient(url, hc)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Logf("%s", b)
	return len(b), nil
}

// Eventually waits until check returns nil, for at most limit.
func Eventually(t *testing.T, limit time.Duration, check func() error) {
	t.Helper()
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-deadline.C:
			t.Fatalf("not within %s: %v", limit, err)
		case <-tick.C:
		}
	}
}

// get is a plain GET of an admin route.
func get(url string) (int, []byte, error) {
	resp, err := http.Get(url)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp.StatusCode, b, err
}
