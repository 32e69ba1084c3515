package abuse

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"kraken/deploy/devcluster"
)

// options of a cluster; the zero value has no agents.
type options struct {
	agents    int
	mutualTLS bool // see devcluster.Options
	// config is laid over the roles' configuration, by role ("agent") or component ("kraken-agent-01"), see
	// devcluster.Options.
	config map[string]map[string]any
}

// system is a cluster of real processes on free ports of loopback.
type system struct {
	plan *devcluster.Cluster
	dir  string

	Bucket, Proxy, BuildIndex, Tracker *process
	Origins, Agents                    []*process
}

// process is one component of a cluster.
type process struct {
	*devcluster.Component
	URL      string // of its main listener, without a slash at the end
	AdminURL string // "" for the bucket
	c        *system
}

// start starts a cluster that ends with the test. When the test fails, the end of each component's log is shown.
func start(t *testing.T, o options) *system {
	t.Helper()
	c, err := open(t.Context(), t.TempDir(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			c.logs(t)
		}
		if err := c.close(); err != nil {
			t.Errorf("end the cluster: %v", err)
		}
	})
	return c
}

// common are the clusters that tests share: a plain one, and one with mutual TLS.
var common [2]struct {
	once sync.Once
	dir  string
	c    *system
	err  error
}

// endCommon ends the shared clusters, those that a test started.
func endCommon() error {
	var errs []error
	for i := range common {
		if common[i].c != nil {
			errs = append(errs, common[i].c.close())
		}
	}
	return errors.Join(errs...)
}

// shared is a cluster with two agents and the dev cluster's configuration, started once for all tests. Who uses it
// leaves every process running and reachable, and uses repositories of its own. What is to be counted or measured needs
// a cluster of its own.
func shared(t *testing.T) *system { return sharedOf(t, 0) }

// sharedTLS is the same with mutual TLS.
func sharedTLS(t *testing.T) *system { return sharedOf(t, 1) }

func sharedOf(t *testing.T, i int) *system {
	t.Helper()
	s := &common[i]
	s.once.Do(func() { s.c, s.err = open(context.Background(), s.dir, options{agents: 2, mutualTLS: i == 1}) })
	if s.err != nil {
		t.Fatal(s.err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			s.c.logs(t)
		}
	})
	return s.c
}

func open(ctx context.Context, dir string, o options) (*system, error) {
	plan, err := devcluster.Plan(devcluster.Options{
		Dir: dir, Bin: bin, Agents: o.agents, FreePorts: true, MutualTLS: o.mutualTLS, Config: o.config, Bound: true,
	})
	if err != nil {
		return nil, err
	}
	if err := plan.Up(ctx, io.Discard); err != nil {
		return nil, err
	}
	c := &system{plan: plan, dir: dir}
	for _, part := range plan.Components {
		p := &process{Component: part, URL: plan.URL(part), c: c}
		if part.Admin != "" {
			p.AdminURL = "http://" + part.Admin
		}
		switch part.Role {
		case "testfs":
			c.Bucket = p
		case "proxy":
			c.Proxy = p
		case "build-index":
			c.BuildIndex = p
		case "tracker":
			c.Tracker = p
		case "origin":
			c.Origins = append(c.Origins, p)
		case "agent":
			c.Agents = append(c.Agents, p)
		}
	}
	return c, nil
}

// close ends what runs. Nothing here is worth waiting 30 s for a request that a test left open, so it is killed, agents
// first.
func (c *system) close() error { return c.plan.KillAll(context.Background()) }

func (c *system) logs(t *testing.T) {
	for _, part := range c.plan.Components {
		t.Logf("the end of the log of %s:\n%s", part.Name, c.plan.Tail(context.Background(), part))
	}
}

// all is every process but the bucket, which is no part of the product.
func (c *system) all() []*process {
	out := []*process{c.Proxy, c.BuildIndex, c.Tracker}
	return append(append(out, c.Origins...), c.Agents...)
}

// client is a client without a certificate, which trusts the cluster's authority where there is one. Redirects are not
// followed.
func (c *system) client(t *testing.T) *http.Client { return c.clientOf(t, "") }

// clientOf is a client with a certificate of the cluster's authority for id: of a component ("agent-01"), or a new one.
// For clusters with mutual TLS.
func (c *system) clientOf(t *testing.T, id string) *http.Client {
	t.Helper()
	tr := &http.Transport{}
	if c.plan.MutualTLS {
		tr.TLSClientConfig = c.tls(t, id)
	}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{
		Transport: tr, Timeout: time.Minute,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// tls is what a client of a cluster with mutual TLS needs; without id it shows no certificate.
func (c *system) tls(t *testing.T, id string) *tls.Config {
	t.Helper()
	ca, err := os.ReadFile(c.plan.Certificate(id).CA)
	if err != nil {
		t.Fatal(err)
	}
	cfg := &tls.Config{RootCAs: x509.NewCertPool()}
	cfg.RootCAs.AppendCertsFromPEM(ca)
	if id == "" {
		return cfg
	}
	f := c.plan.Certificate(id)
	if _, err := os.Stat(f.Cert); errors.Is(err, os.ErrNotExist) {
		if f, err = c.plan.Issue(id); err != nil {
			t.Fatal(err)
		}
	}
	pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Certificates = []tls.Certificate{pair}
	return cfg
}

// kill ends a process at once; start starts it again and waits until it is ready.
func (p *process) kill(t *testing.T)  { t.Helper(); p.do(t, p.c.plan.Kill) }
func (p *process) start(t *testing.T) { t.Helper(); p.do(t, p.c.plan.Start) }

func (p *process) do(t *testing.T, what func(context.Context, string) error) {
	t.Helper()
	if err := what(context.Background(), p.Name); err != nil {
		t.Fatal(err)
	}
}

// alive fails the test when the process has ended, or was started again by somebody.
func (p *process) alive(t *testing.T) {
	t.Helper()
	if p.PID() == 0 {
		t.Fatalf("%s has ended", p.Name)
	}
}

// state is the folder that the process writes to.
func (p *process) state() string { return p.c.plan.StateDir(p.Component) }

// rss is the resident memory of the process, in bytes.
func (p *process) rss(t *testing.T) int64 {
	t.Helper()
	n, err := devcluster.Memory(p.PID(), "VmRSS")
	if err != nil {
		t.Fatalf("%s: %v", p.Name, err)
	}
	return n
}

// descriptors is how many the process has open.
func (p *process) descriptors(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir(filepath.Join("/proc", fmt.Sprint(p.PID()), "fd"))
	if err != nil {
		t.Fatalf("%s: %v", p.Name, err)
	}
	return len(fds)
}

// metric is the sum of all series of a metric of the process, whatever their labels; 0 when there is none.
func (p *process) metric(t *testing.T, name string) float64 {
	t.Helper()
	resp, err := http.Get(p.AdminURL + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for l := range bytes.Lines(b) {
		rest, ok := strings.CutPrefix(string(l), name)
		if !ok || (rest[0] != ' ' && rest[0] != '{') {
			continue
		}
		var v float64
		if _, err := fmt.Sscan(rest[strings.LastIndexByte(rest, ' ')+1:], &v); err != nil {
			t.Fatalf("metric %q: %v", l, err)
		}
		sum += v
	}
	return sum
}

// eventually waits until check returns nil, for at most limit.
func eventually(t *testing.T, limit time.Duration, check func() error) {
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
