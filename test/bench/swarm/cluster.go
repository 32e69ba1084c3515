package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
)

// process is one that the bench started.
type process struct {
	cmd  *exec.Cmd
	name string
	log  string
	done chan struct{}
}

// start runs a program in a node. env is added to the environment.
func start(x *node, dir, name string, env []string, argv ...string) (*process, error) {
	if x.ns != "" {
		argv = append([]string{"ip", "netns", "exec", x.ns}, argv...)
	}
	p := &process{cmd: exec.Command(argv[0], argv[1:]...), name: name, log: filepath.Join(dir, name+".log"), done: make(chan struct{})}
	log, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(p.done)
		p.cmd.Wait() // the exit code of what was killed says nothing
	}()
	return p, nil
}

func (p *process) end() {
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		p.kill()
	}
}

func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.done
}

// cpu is what the process has used.
func (p *process) cpu() (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	user, err1 := strconv.ParseInt(fields[11], 10, 64)
	system, err2 := strconv.ParseInt(fields[12], 10, 64)
	return time.Duration(user+system) * 10 * time.Millisecond, errors.Join(err1, err2) // USER_HZ is 100 on Linux
}

// memory is a line of the process's status, such as VmRSS or VmHWM, in bytes.
func (p *process) memory(line string) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for l := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(l, line+":"); ok {
			kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("no %s of process %s", line, p.name)
}

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
	mbit   int            // what agents are told of their link; 0: nothing
	env    []string       // of agents
	agent  map[string]any // more keys of the agents' configuration
}

// cluster is one origin, the other roles, and agents; in namespaces, or on loopback.
type cluster struct {
	o      options
	bin    string
	dir    string
	net    *network // nil on loopback
	core   *node
	origin *node
	agents []*node
	procs  map[string]*process
	ports  map[string]int // on loopback: of name and use
}

const firstPort = 17100 // of loopback clusters

// port is where a role listens in its node: registry, peer, admin.
func (c *cluster) port(x *node, role string, use int) int {
	if c.net != nil {
		return map[string]int{"proxy": 16000, "build-index": 16010, "tracker": 16020, "origin": 16030, "agent": 16060}[role] + use
	}
	key := x.name + role + strconv.Itoa(use)
	if c.ports[key] == 0 {
		c.ports[key] = firstPort + len(c.ports)
	}
	return c.ports[key]
}

func (c *cluster) addr(x *node, role string, use int) string {
	return x.ip + ":" + strconv.Itoa(c.port(x, role, use))
}

func (c *cluster) url(x *node, role string) string { return "http://" + c.addr(x, role, 0) }

func (b *bench) newCluster(ctx context.Context, o options) (_ *cluster, err error) {
	c := &cluster{o: o, bin: b.bin, procs: map[string]*process{}, ports: map[string]int{}}
	// Beside the results and not in /tmp, which may be memory.
	if err := os.MkdirAll(b.out, 0o755); err != nil {
		return nil, err
	}
	// A name that go's ./... leaves alone.
	if c.dir, err = os.MkdirTemp(b.out, ".state-"); err != nil {
		return nil, err
	}
	if c.dir, err = filepath.Abs(c.dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.close())
		}
	}()
	names := []string{"core", "origin"}
	for i := range o.agents {
		names = append(names, fmt.Sprintf("agent%02d", i+1))
	}
	var nodes []*node
	if o.shaped {
		if c.net, err = newNetwork(names...); err != nil {
			return nil, err
		}
		nodes = c.net.nodes
	} else {
		for _, n := range names {
			nodes = append(nodes, &node{name: n, ip: "127.0.0.1"})
		}
	}
	c.core, c.origin, c.agents = nodes[0], nodes[1], nodes[2:]
	if err := c.startRoles(ctx); err != nil {
		return nil, err
	}
	for _, a := range c.agents {
		if err := c.startAgent(a); err != nil {
			return nil, err
		}
	}
	for _, a := range c.agents {
		if err := c.await(ctx, a, "agent"); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func (c *cluster) close() error {
	for _, p := range c.procs {
		p.cmd.Process.Signal(syscall.SIGTERM)
	}
	for _, p := range c.procs {
		p.end()
	}
	var err error
	if c.net != nil {
		err = c.net.close()
	}
	return errors.Join(err, os.RemoveAll(c.dir))
}

func (c *cluster) base() map[string]any {
	return map[string]any{
		"log": map[string]any{"level": "info"}, "replicas": 1,
		"origins": []any{map[string]any{"id": "origin-01", "url": c.url(c.origin, "origin"), "peer": c.addr(c.origin, "origin", 1)}},
	}
}

// run starts a role with base and more as its configuration. JSON is YAML.
func (c *cluster) run(x *node, role string, env []string, more map[string]any) error {
	conf := c.base()
	conf["server"] = map[string]any{"listen": c.addr(x, role, 0)}
	conf["admin"] = map[string]any{"listen": c.addr(x, role, 2)}
	for k, v := range more {
		conf[k] = v
	}
	text, err := json.Marshal(conf)
	if err != nil {
		return err
	}
	path := filepath.Join(c.dir, x.name+"-"+role+".yaml")
	if err := os.WriteFile(path, text, 0o644); err != nil {
		return err
	}
	p, err := start(x, c.dir, x.name+"-"+role, env, filepath.Join(c.bin, "kraken-"+role), "--config", path)
	if err != nil {
		return err
	}
	c.procs[x.name+"-"+role] = p
	return nil
}

func (c *cluster) startRoles(ctx context.Context) error {
	folder := func(name string) string { return filepath.Join(c.dir, name) }
	buckets := []any{map[string]any{"name": "bench", "url": "file://" + folder("bucket")}}
	index := map[string]any{"url": c.url(c.core, "build-index")}
	peer := map[string]any{"listen": c.addr(c.origin, "origin", 1)}
	return errors.Join(
		os.Mkdir(folder("bucket"), 0o755),
		c.run(c.origin, "origin", nil, map[string]any{"id": "origin-01", "dir": folder("origin"), "buckets": buckets, "peer": peer}),
		c.run(c.core, "tracker", nil, nil),
		c.run(c.core, "build-index", nil, map[string]any{"database": folder("names.db"), "buckets": buckets}),
		c.run(c.core, "proxy", nil, map[string]any{"build_index": index}),
		c.await(ctx, c.origin, "origin"), c.await(ctx, c.core, "tracker"), c.await(ctx, c.core, "build-index"), c.await(ctx, c.core, "proxy"),
	)
}

func (c *cluster) startAgent(a *node) error {
	peer := map[string]any{"listen": c.addr(a, "agent", 1)}
	if c.o.mbit > 0 {
		peer["link_rate"] = fmt.Sprintf("%dMbit/s", c.o.mbit)
	}
	conf := map[string]any{
		"node": a.name, "peer": peer, "cache": map[string]any{"dir": c.cache(a)},
		"build_index": map[string]any{"url": c.url(c.core, "build-index")}, "tracker": map[string]any{"url": c.url(c.core, "tracker")},
	}
	for k, v := range c.o.agent {
		conf[k] = v
	}
	return c.run(a, "agent", c.o.env, conf)
}

// cache is the folder of an agent.
func (c *cluster) cache(a *node) string { return filepath.Join(c.dir, a.name+"-cache") }

// renew ends the agents, forgets what they cached, and starts them again.
func (c *cluster) renew(ctx context.Context) error {
	for _, a := range c.agents {
		if p := c.procs[a.name+"-agent"]; p != nil {
			p.end()
		}
		if err := errors.Join(os.RemoveAll(c.cache(a)), c.startAgent(a)); err != nil {
			return err
		}
	}
	for _, a := range c.agents {
		if err := c.await(ctx, a, "agent"); err != nil {
			return err
		}
	}
	return nil
}

// await waits until a role is ready.
func (c *cluster) await(ctx context.Context, x *node, role string) error {
	return eventually(ctx, 30*time.Second, x.name+" "+role+" is ready", func() (bool, error) {
		resp, err := x.client().Get(c.url(x, role) + "/readiness")
		if err != nil {
			return false, nil // not listening yet
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK, nil
	})
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
	hc := c.core.client()
	defer hc.CloseIdleConnections()
	return pushTo(ctx, hc, c.url(c.core, "proxy"), d, size, r)
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
	hc := c.origin.client()
	defer hc.CloseIdleConnections()
	return eventually(ctx, 2*time.Minute, "blob "+d.String()+" has metainfo and is written back", func() (bool, error) {
		resp, err := hc.Get(c.url(c.origin, "origin") + "/v2/" + repository + "/_kraken/metainfo/" + d.String())
		if err != nil {
			return false, err
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return false, nil
		}
		left, err := hc.Get("http://" + c.addr(c.origin, "origin", 2) + "/writeback")
		if err != nil {
			return false, err
		}
		defer left.Body.Close()
		var s struct{ Pending int }
		return s.Pending == 0, json.NewDecoder(left.Body).Decode(&s)
	})
}

// pulled is what a client saw.
type pulled struct {
	first, took time.Duration
	n           int64
}

// pull reads a blob from an agent as a runtime would; its bytes are checked.
func (c *cluster) pull(ctx context.Context, a *node, b blobOf) (pulled, error) {
	return get(ctx, a.client(), c.url(a, "agent")+"/v2/"+repository+"/blobs/"+b.digest.String(), b.digest)
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
