package sim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/buildindex"
	"kraken/origin"
	"kraken/origin/bucket"
	proto "kraken/proto/cluster"
	"kraken/proto/config"
	"kraken/proto/registry"
	"kraken/proto/ring"
	"kraken/proto/role"
	"kraken/proto/transport"
	"kraken/proxy"
)

// Options is the shape of a cluster.
type Options struct {
	Seed     uint64
	Origins  int        // 0: 3
	Replicas int        // 0: 2
	Dir      string     // an empty folder, best in memory
	Log      slog.Level // of what the roles say that comes into the history
	Twin     bool       // there is a second build-index, which is down at first
	// Unchecked turns off the check of every step.
	Unchecked bool
}

// Sim is one cluster in virtual time. Its methods that stop, start and damage are for one goroutine, the test's.
type Sim struct {
	Options
	rnd      *rand.Rand
	net      *network
	bucket   *memory
	origins  []*node
	index    *node
	twin     *node // the second build-index, nil where there is none
	standsBy bool  // the other is started again once all is healed
	serving  *node // the one of the two that the address of build-index leads to, or will once all is healed
	proxies  []*node
	clients  []*client
	members  []ring.Member
	history  *history

	mu    sync.Mutex // of model
	model *model
	repos map[string]chan struct{}

	ops   sync.WaitGroup
	ended sync.WaitGroup // roles
	files int            // names of folders given out
}

// node is a machine with the one role that it runs.
type node struct {
	s    *Sim
	name string
	h    *host
	open func(n *node, p *process) (role.Runner, error)

	p      atomic.Pointer[process] // nil while it is down
	ended  atomic.Pointer[process] // the one that ended by itself, as it may
	cancel context.CancelFunc
	done   chan struct{}

	disk     *disk                       // of an origin
	database string                      // of build-index: a folder
	old      string                      // a copy of the disk as it was
	lost     bool                        // its disk was lost since the last check of all
	lostAt   time.Time                   // its disk was lost last
	rottenAt map[digest.Digest]time.Time // a copy was lost last
}

// New makes a cluster that is down.
func New(o Options) (*Sim, error) {
	if o.Origins == 0 {
		o.Origins = 3
	}
	if o.Replicas == 0 {
		o.Replicas = 2
	}
	s := &Sim{Options: o, rnd: rand.New(rand.NewPCG(o.Seed, 0)), net: newNetwork(o.Seed), bucket: newMemory(o.Seed), model: newModel(),
		history: &history{began: time.Now()}, repos: map[string]chan struct{}{}}
	for i := range o.Origins {
		n := s.node(fmt.Sprintf("origin-%02d", i+1), openOrigin)
		var err error
		if n.disk, err = newDisk(s.folder(n.name), o.Seed+uint64(i)); err != nil {
			return nil, err
		}
		s.origins = append(s.origins, n)
		s.members = append(s.members, ring.Member{ID: n.name, URL: "http://" + n.h.addr()})
	}
	s.index = s.node("build-index", openIndex)
	s.index.database = s.folder("build-index")
	s.serving = s.index
	for i := range 2 {
		s.proxies = append(s.proxies, s.node(fmt.Sprintf("proxy-%02d", i+1), openProxy))
	}
	h := s.net.addHost("clients")
	p := h.start()
	for _, n := range s.proxies {
		c, err := newClient(s, p, n)
		if err != nil {
			return nil, err
		}
		s.clients = append(s.clients, c)
	}
	if o.Twin {
		s.addTwin()
	}
	return s, nil
}

func (s *Sim) node(name string, open func(*node, *process) (role.Runner, error)) *node {
	return &node{s: s, name: name, h: s.net.addHost(name), open: open, rottenAt: map[digest.Digest]time.Time{}}
}

// folder is a new name for a folder.
func (s *Sim) folder(name string) string {
	s.files++
	return filepath.Join(s.Dir, fmt.Sprintf("%03d-%s", s.files, name))
}

// nodes are all that run a role.
func (s *Sim) nodes() []*node {
	all := append(append(append([]*node{}, s.origins...), s.index), s.proxies...)
	if s.twin != nil {
		all = append(all, s.twin)
	}
	return all
}

func (n *node) base(p *process) role.Config {
	server := func(port string) transport.ServerConfig {
		return transport.ServerConfig{Listen: n.h.ip.String() + ":" + port, Bind: p.listen, DrainTimeout: config.Duration(5 * time.Second)}
	}
	admin := server("81")
	admin.Open = true // its network is the simulation's own
	return role.Config{Server: server("80"), Admin: admin, Client: transport.ClientConfig{Dial: p.dial}, Origins: n.s.members, Replicas: n.s.Replicas}
}

func (n *node) buckets(p *process) []bucket.Config {
	return []bucket.Config{{Name: "b", URL: "mem://", Driver: handle{n.s.bucket, p}}}
}

func (n *node) deps() role.Deps {
	return role.Deps{Log: slog.New(logs{n.s.history, n.name, n.s.Log, nil}), Registry: prometheus.NewRegistry()}
}

func openOrigin(n *node, p *process) (role.Runner, error) {
	return origin.New(origin.Config{
		Config: n.base(p), ID: n.name, Dir: n.disk.dir, OpenFS: n.disk.open(p), Buckets: n.buckets(p), Peer: origin.Peer{Off: true},
		UploadIdle: config.Duration(240 * time.Hour), // files have real times
	}, n.deps())
}

func openIndex(n *node, p *process) (role.Runner, error) {
	return buildindex.New(buildindex.Config{
		Config: n.base(p), Database: filepath.Join(n.database, "names.db"), OpenNames: p.openNames, Machine: n.name, Buckets: n.buckets(p),
	}, n.deps())
}

func openProxy(n *node, p *process) (role.Runner, error) {
	return proxy.New(proxy.Config{
		Config: n.base(p), Names: []string{"sim.test"}, BuildIndex: role.Endpoint{URL: "http://" + n.s.indexAddr()}, UploadKey: config.NewSecret("the key that all proxies of this cluster share"),
	}, n.deps())
}

// start starts a role on what its disk has.
func (n *node) start() {
	if n.p.Load() != nil {
		return
	}
	p := n.h.start()
	r, err := n.open(n, p)
	if err != nil {
		n.s.history.violate("start", "%s does not start: %v", n.name, err)
		p.kill(false)
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel, n.done = cancel, make(chan struct{})
	n.p.Store(p)
	done := n.done
	n.s.ended.Go(func() {
		defer close(done)
		err := r.Run(ctx)
		switch {
		case err == nil || ctx.Err() != nil || !p.alive():
		case n.s.mayEnd(n, err):
			n.s.history.note("%s ends: %s", n.name, brief(err))
			n.ended.Store(p)
		default:
			n.s.history.violate("start", "%s ended by itself: %v", n.name, err)
		}
	})
}

// kill ends a role as kill -9 does, or with its machine, of which nobody hears any more.
func (n *node) kill(vanish bool) {
	p := n.p.Swap(nil)
	if p == nil {
		n.s.net.mu.Lock()
		n.h.gone = n.h.gone || vanish
		n.s.net.mu.Unlock()
		return
	}
	var err error
	if n.disk == nil && n.database != "" { // now, when nobody writes
		err = n.copyDatabase(n.database)
	}
	p.kill(vanish)
	n.cancel()
	if n.disk != nil {
		err = n.disk.killed()
	}
	if err != nil {
		n.s.history.violate("sim", "kill %s: %v", n.name, err)
	}
}

// copyDatabase makes a copy of a database the one that the next start opens. Nobody writes it now.
func (n *node) copyDatabase(from string) error {
	to := n.s.folder(n.name)
	if err := copyDatabase(from, to); err != nil {
		return err
	}
	n.database = to
	return nil
}

func copyDatabase(from, to string) error {
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	es, err := os.ReadDir(from)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range es {
		b, rerr := os.ReadFile(filepath.Join(from, e.Name()))
		if filepath.Ext(e.Name()) != ".db-shm" && rerr == nil {
			rerr = os.WriteFile(filepath.Join(to, e.Name()), b, 0o600)
		}
		err = errors.Join(err, rerr)
	}
	return err
}

// up starts all that is down, and ends all other disturbance but damage to disks.
func (s *Sim) heal() {
	s.net.mu.Lock()
	s.net.apart, s.net.late, s.net.twice = map[[2]string]bool{}, 0, 0
	s.net.mu.Unlock()
	s.bucket.set(bucketUp)
	s.bucket.slow(2*time.Millisecond, 0)
	idle := s.reconcile()
	for _, n := range s.nodes() {
		if n.p.Load() != nil {
			s.net.freeze(n.h, false)
		}
		if n.disk != nil {
			n.disk.slower(0)
		}
		if n != idle {
			n.start()
		}
	}
	s.net.mu.Lock()
	for _, n := range s.nodes() {
		n.h.wake()
	}
	s.net.mu.Unlock()
}

// status asks a role's admin listener for what it still has to write.
func (s *Sim) status(n *node) (w proto.WritebackStatus, err error) {
	resp, err := s.clients[0].hc.Get("http://" + n.h.ip.String() + ":81/writeback")
	if err != nil {
		return w, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, b)
	}
	if err == nil {
		err = json.Unmarshal(b, &w)
	}
	return w, err
}

// owing says who still has something to write to the bucket, or to restore.
func (s *Sim) owing() error {
	s.supervise()
	if err := s.answers(); err != nil {
		return err
	}
	for _, n := range append([]*node{s.serving}, s.origins...) {
		w, err := s.status(n)
		if err != nil {
			return fmt.Errorf("%s: %w", n.name, err)
		}
		if w.Pending+w.Names > 0 {
			return fmt.Errorf("%s: %+v", n.name, w)
		}
	}
	return nil
}

// await waits until check returns nil, and returns its last error when that takes too long.
func await(most time.Duration, check func() error) error {
	for began := time.Now(); ; {
		err := check()
		if err == nil || time.Since(began) > most {
			return err
		}
		time.Sleep(500 * time.Millisecond)
	}
}

// Close ends everything.
func (s *Sim) Close() {
	s.heal()
	s.ops.Wait()
	for _, n := range s.nodes() {
		n.kill(false)
	}
	s.ended.Wait()
	for _, c := range s.clients {
		c.p.kill(false)
		c.hc.CloseIdleConnections()
	}
	synctest.Wait()
}

var _ registry.Blobs = (*registry.Client)(nil)
