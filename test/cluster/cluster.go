// Package cluster runs every role of a cluster in one process, on loopback with real disks, a real bucket server and
// real BitTorrent, for tests.
package cluster

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kraken/agent"
	"kraken/buildindex"
	"kraken/origin"
	"kraken/origin/bucket"
	"kraken/proto/cluster"
	"kraken/proto/config"
	"kraken/proto/registry"
	"kraken/proto/ring"
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
	Dir        string
	Bucket     *testfs.Server
	Origins    []*Part
	Tracker    *Part
	BuildIndex *Part
	ProxyPart  *Part
	AgentParts []*Part

	Proxy, OtherProxy *registry.Client
	ProxyURL          string // of the first
	OriginURLs        []string
	Agents            []*registry.Client
	admins            map[string]string // part → address of its admin listener

	// Listeners are the addresses of every part but testfs, admin listeners apart.
	Listeners []string
}

// New starts a cluster with three origins and n agents, on plain HTTP. It ends with the test.
func New(t *testing.T, n int) *Cluster {
	t.Helper()
	return start(t, n, "http://", transport.PeerTLS{})
}

// NewMutualTLS is New with a cluster that takes only its own nodes, on every listener.
func NewMutualTLS(t *testing.T, n int) *Cluster {
	t.Helper()
	return start(t, n, "https://", issue(t))
}

func start(t *testing.T, n int, scheme string, id transport.PeerTLS) *Cluster {
	t.Helper()
	c := &Cluster{t: t, Dir: t.TempDir(), admins: map[string]string{}}
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	if testing.Verbose() {
		log = slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelWarn}))
	}
	deps := func(name string) *slog.Logger { return log.With("part", name) }
	server := func(addr string) transport.ServerConfig {
		return transport.ServerConfig{
			Listen: addr, DrainTimeout: config.Duration(5 * time.Second), TLS: transport.TLS{Cert: id.Cert, Key: id.Key, ClientCA: id.CA},
		}
	}
	admin := func(addr string) transport.ServerConfig {
		return transport.ServerConfig{Listen: addr, DrainTimeout: config.Duration(5 * time.Second)}
	}
	clients := transport.ClientConfig{CA: id.CA, Cert: id.Cert, Key: id.Key}
	stock := id == transport.PeerTLS{} // a stock client can't speak TLS

	s3 := c.part("testfs", func() (Role, error) {
		s, err := testfs.New(testfs.Config{Listen: "127.0.0.1:0", Dir: filepath.Join(c.Dir, "bucket"), Log: deps("testfs")})
		c.Bucket = s
		return s, err
	})
	s3.Start()
	buckets := []bucket.Config{{
		Name: "b", URL: "s3://kraken?region=us-east-1&use_path_style=true&endpoint=http://" + c.Bucket.Addr(),
		AccessKey: config.NewSecret("k"), SecretKey: config.NewSecret("s"),
	}}
	keyFile := filepath.Join(c.Dir, "record.key")
	if _, _, err := cluster.OpenNameSigner(keyFile); err != nil {
		t.Fatal(err)
	}
	var members []ring.Member
	for i := range 3 {
		members = append(members, ring.Member{ID: fmt.Sprintf("origin-%02d", i+1), URL: scheme + freeAddr(t), Peer: freeAddr(t)})
	}
	for _, m := range members {
		c.OriginURLs = append(c.OriginURLs, m.URL)
		adminAddr := freeAddr(t)
		c.admins[m.ID] = adminAddr
		c.Origins = append(c.Origins, c.part(m.ID, func() (Role, error) {
			return origin.New(origin.Config{
				ID: m.ID, Config: role.Config{Server: server(m.URL[len(scheme):]), Admin: admin(adminAddr), Client: clients, Origins: members},
				Dir: c.StateDir(m.ID), Buckets: buckets, Peer: origin.Peer{Listen: m.Peer, StockPeers: stock, TLS: id},
				RecordKeys: []string{"file:" + keyFile + ".pub"}, BuildIndexNames: []string{nodeName},
			}, role.Deps{Log: deps(m.ID), Registry: prometheus.NewRegistry()})
		}))
	}
	trackerAddr, indexAddr, indexAdmin, proxyAddr := freeAddr(t), freeAddr(t), freeAddr(t), freeAddr(t)
	c.admins["build-index"] = indexAdmin
	c.Tracker = c.part("tracker", func() (Role, error) {
		return tracker.New(tracker.Config{Config: role.Config{Server: server(trackerAddr), Client: clients, Origins: members}, StockPeers: stock}, role.Deps{Log: deps("tracker"), Registry: prometheus.NewRegistry()})
	})
	c.BuildIndex = c.part("build-index", func() (Role, error) {
		return buildindex.New(buildindex.Config{
			Config:   role.Config{Server: server(indexAddr), Admin: admin(indexAdmin), Client: clients, Origins: members},
			Database: filepath.Join(c.StateDir("build-index"), "names.db"), Buckets: buckets, RecordKeyFile: keyFile,
		}, role.Deps{Log: deps("build-index"), Registry: prometheus.NewRegistry()})
	})
	newProxy := func(name, addr string) *Part {
		return c.part(name, func() (Role, error) {
			return proxy.New(proxy.Config{
				Config: role.Config{Server: server(addr), Client: clients, Origins: members}, BuildIndex: role.Endpoint{URL: scheme + indexAddr},
				UploadKey: config.NewSecret("the key that all proxies of this cluster share"),
			}, role.Deps{Log: deps(name), Registry: prometheus.NewRegistry()})
		})
	}
	c.ProxyPart, c.ProxyURL = newProxy("proxy", proxyAddr), scheme+proxyAddr
	otherAddr := freeAddr(t)
	other := newProxy("other proxy", otherAddr)
	c.Proxy, c.OtherProxy = client(t, scheme+proxyAddr, clients), client(t, scheme+otherAddr, clients)
	for i := range n {
		name, addr, peer := fmt.Sprintf("agent-%02d", i+1), freeAddr(t), freeAddr(t)
		c.AgentParts = append(c.AgentParts, c.part(name, func() (Role, error) {
			return agent.New(agent.Config{
				Config: role.Config{Server: server(addr), Client: clients, Origins: members}, Node: name,
				BuildIndex: role.Endpoint{URL: scheme + indexAddr}, Tracker: role.Endpoint{URL: scheme + trackerAddr},
				Peer: agent.Peer{Listen: peer, StockPeers: stock, TLS: id}, Cache: agent.Cache{Dir: c.StateDir(name)},
				ManifestTTL: config.Duration(ManifestTTL),
			}, role.Deps{Log: deps(name), Registry: prometheus.NewRegistry()})
		}))
		c.Listeners = append(c.Listeners, addr, peer)
		c.Agents = append(c.Agents, client(t, scheme+addr, clients))
	}
	for _, m := range members {
		c.Listeners = append(c.Listeners, m.URL[len(scheme):], m.Peer)
	}
	c.Listeners = append(c.Listeners, trackerAddr, indexAddr, proxyAddr, otherAddr)
	for _, p := range append(append(append([]*Part{}, c.Origins...), c.Tracker, c.BuildIndex, c.ProxyPart, other), c.AgentParts...) {
		p.Start()
	}
	Eventually(t, time.Minute, func() error { return c.owed("build-index") }) // until then what it lacks is 503
	return c
}

// owed says what some parts have not written to the bucket, or, a build-index, not restored yet.
func (c *Cluster) owed(names ...string) error {
	for _, name := range names {
		_, b, err := get("http://" + c.Admin(name) + "/writeback")
		if err != nil {
			return err
		}
		var s cluster.WritebackStatus
		if err := json.Unmarshal(b, &s); err != nil {
			return err
		}
		if s.Pending+s.Names > 0 {
			return fmt.Errorf("%s has %+v", name, s)
		}
	}
	return nil
}

// StateDir is a part's disk.
func (c *Cluster) StateDir(name string) string { return filepath.Join(c.Dir, name) }

// Admin is the address of a part's admin listener: origin-01..03 and build-index have one.
func (c *Cluster) Admin(name string) string { return c.admins[name] }

func (c *Cluster) part(name string, mk func() (Role, error)) *Part {
	p := &Part{t: c.t, name: name, make: mk}
	c.t.Cleanup(p.Stop)
	return p
}

// nextPort walks a range below the one that the kernel takes ports of outgoing connections from (32768 and up), so that
// no connection gets a port between the choice and the listener.
var nextPort atomic.Int32

const firstPort, ports = 20_000, 10_000

// freeAddr is a loopback address that was free a moment ago: parts must know each other's before they start.
func freeAddr(t *testing.T) string {
	t.Helper()
	for range ports {
		port := firstPort + (int(nextPort.Add(1))+os.Getpid()*101)%ports
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		defer l.Close()
		return l.Addr().String()
	}
	t.Fatal("no free port")
	return ""
}

func client(t *testing.T, url string, cfg transport.ClientConfig) *registry.Client {
	t.Helper()
	hc, err := transport.NewClient(cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hc.CloseIdleConnections)
	c, err := registry.NewClient(url, hc)
	if err != nil {
		t.Fatal(err)
	}
	return c
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

// nodeName is the common name in the one certificate of all nodes.
const nodeName = "node"

// issue writes an authority and the one certificate of all nodes of a cluster.
func issue(t *testing.T) transport.PeerTLS {
	t.Helper()
	dir := t.TempDir()
	write := func(name, kind string, der []byte) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	key := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	sign := func(c, parent *x509.Certificate, k, by *ecdsa.PrivateKey) []byte {
		der, err := x509.CreateCertificate(rand.Reader, c, parent, k.Public(), by)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	caKey, nodeKey := key(), key()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "cluster"}, NotAfter: time.Now().AddDate(1, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	node := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: nodeName}, NotAfter: time.Now().AddDate(1, 0, 0),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	nodeKeyDER, err := x509.MarshalPKCS8PrivateKey(nodeKey)
	if err != nil {
		t.Fatal(err)
	}
	return transport.PeerTLS{
		CA:   write("ca.pem", "CERTIFICATE", sign(ca, ca, caKey, caKey)),
		Cert: write("node.pem", "CERTIFICATE", sign(node, ca, nodeKey, caKey)),
		Key:  write("node.key", "PRIVATE KEY", nodeKeyDER),
	}
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
