package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"kraken/proto/cluster"
	"kraken/test/bench/report"
)

const rival = "docker-registry"

// contestant is a registry that is measured: some processes, with an address for clients.
type contestant struct {
	name, addr string
	ready      []string // URLs that answer 200 when it can be measured
	dir        string
	procs      []*proc
	idle       []string // admin addresses that say what is left to write in the background
}

type proc struct {
	name string
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when it ended
}

const (
	startTimeout = 30 * time.Second
	stopTimeout  = 40 * time.Second
	quietTimeout = 5 * time.Minute
)

// startAll starts every contestant in dir. stop ends what was started, also after an error.
func startAll(ctx context.Context, bin, dir string) (cs []*contestant, stop func() error, err error) {
	stop = func() error {
		var errs []error
		for _, c := range cs {
			errs = append(errs, c.stop())
		}
		return errors.Join(errs...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, stop())
		}
	}()
	// All at once: what one contestant was given and does not listen on yet looks free to the next.
	ports, err := freePorts(rivalPorts + krakenPorts(1) + krakenPorts(2))
	if err != nil {
		return nil, stop, err
	}
	take := func() string {
		p := ports[0]
		ports = ports[1:]
		return p
	}
	for _, start := range []func(*contestant) error{
		func(c *contestant) error { return c.startRival(take) },
		func(c *contestant) error { return c.startKraken(bin, 1, take) },
		func(c *contestant) error { return c.startKraken(bin, 2, take) },
	} {
		c := &contestant{dir: dir}
		cs = append(cs, c)
		if err := start(c); err != nil {
			return cs, stop, err
		}
		if err := c.await(ctx); err != nil {
			return cs, stop, err
		}
	}
	return cs, stop, nil
}

const rivalPorts = 1

func (c *contestant) startRival(take func() string) error {
	c.name = rival
	c.dir = filepath.Join(c.dir, c.name)
	c.addr = take()
	c.ready = []string{"http://" + c.addr + "/v2/"}
	// Debian's /etc/docker/registry/config.yml without its login, quiet like Kraken here, and a catalog of one page.
	cfg := fmt.Sprintf(`version: 0.1
log: {level: warn, accesslog: {disabled: true}}
storage:
  cache: {blobdescriptor: inmemory}
  filesystem: {rootdirectory: %q}
  delete: {enabled: true}
catalog: {maxentries: 10000}
http:
  addr: %s
  headers: {X-Content-Type-Options: [nosniff]}
health: {storagedriver: {enabled: true, interval: 10s, threshold: 3}}
`, filepath.Join(c.dir, "state"), c.addr)
	path, err := exec.LookPath("docker-registry")
	if err != nil {
		return fmt.Errorf("%w: test/setup.sh bench installs it", err)
	}
	file, err := c.config("docker-registry", cfg)
	if err != nil {
		return err
	}
	return c.start("docker-registry", path, "serve", file)
}

func krakenPorts(replicas int) int { return 8 + 3*replicas }

func (c *contestant) startKraken(bin string, replicas int, take func() string) error {
	c.name = fmt.Sprintf("kraken-%d", replicas)
	c.dir = filepath.Join(c.dir, c.name)
	bucket := filepath.Join(c.dir, "bucket")
	if err := os.MkdirAll(bucket, 0o755); err != nil {
		return err
	}
	type origin struct{ id, addr, admin, peer string }
	var origins []origin
	list := fmt.Sprintf("log: {level: warn}\nreplicas: %d\norigins:\n", replicas)
	for i := range replicas {
		o := origin{fmt.Sprintf("origin-%02d", i+1), take(), take(), take()}
		origins = append(origins, o)
		list += fmt.Sprintf("  - {id: %s, url: \"http://%s\", peer: %q}\n", o.id, o.addr, o.peer)
	}
	buckets := fmt.Sprintf("buckets: [{name: main, url: \"file://%s\"}]\n", bucket)
	servers := func(addr, admin string) string {
		return fmt.Sprintf("server: {listen: %q}\nadmin: {listen: %q}\n", addr, admin)
	}
	run := func(role, name, cfg string) error {
		file, err := c.config(name, cfg)
		if err != nil {
			return err
		}
		return c.start(name, filepath.Join(bin, "kraken-"+role), "--config", file)
	}
	for _, o := range origins {
		cfg := servers(o.addr, o.admin) + list + buckets +
			fmt.Sprintf("id: %s\ndir: %q\npeer: {listen: %q, stock_peers: true}\n", o.id, filepath.Join(c.dir, o.id, "state"), o.peer)
		if err := run("origin", o.id, cfg); err != nil {
			return err
		}
		c.idle = append(c.idle, o.admin)
	}
	index, indexAdmin, tracker := take(), take(), take()
	if err := run("tracker", "tracker", servers(tracker, take())+list+"stock_peers: true\n"); err != nil {
		return err
	}
	if err := run("build-index", "build-index", servers(index, indexAdmin)+list+buckets+fmt.Sprintf("database: %q\n", filepath.Join(c.dir, "build-index", "names.db"))); err != nil {
		return err
	}
	c.idle = append(c.idle, indexAdmin)
	c.addr = take()
	if err := run("proxy", "proxy", servers(c.addr, take())+list+fmt.Sprintf("build_index: {url: \"http://%s\"}\n", index)); err != nil {
		return err
	}
	agent := take()
	c.ready = []string{"http://" + c.addr + "/readiness", "http://" + agent + "/readiness"}
	return run("agent", "agent", servers(agent, "127.0.0.1:0")+list+
		fmt.Sprintf("build_index: {url: \"http://%s\"}\ntracker: {url: \"http://%s\"}\npeer: {listen: %q, stock_peers: true}\ncache: {dir: %q}\n",
			index, tracker, take(), filepath.Join(c.dir, "agent", "state")))
}

// config writes a process's configuration and makes its folder.
func (c *contestant) config(name, text string) (string, error) {
	dir := filepath.Join(c.dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	file := filepath.Join(dir, "config.yaml")
	return file, os.WriteFile(file, []byte(text), 0o644)
}

func (c *contestant) start(name, path string, args ...string) error {
	p := &proc{name: name, cmd: exec.Command(path, args...), log: filepath.Join(c.dir, name, "log"), done: make(chan struct{})}
	log, err := os.Create(p.log)
	if err != nil {
		return err
	}
	defer log.Close()
	p.cmd.Stdout, p.cmd.Stderr = log, log
	// the terminal's interrupt ends this program, which then ends them
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		return fmt.Errorf("start %s of %s: %w", name, c.name, err)
	}
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait() // how it ended is of interest only where it should not have: see await
	}()
	c.procs = append(c.procs, p)
	return nil
}

// await returns when the registry answers, an error when a process ended or it takes too long.
func (c *contestant) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		var err error
		for _, url := range c.ready {
			if _, err = get(ctx, url); err != nil {
				break
			}
		}
		if err == nil {
			return nil
		}
		for _, p := range c.procs {
			select {
			case <-p.done:
				text, _ := os.ReadFile(p.log)
				return fmt.Errorf("%s of %s ended while starting: %s", p.name, c.name, text)
			default:
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready after %s: %w", c.name, startTimeout, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// quiet returns when nothing is left to be written in the background, and the disk has what was written.
func (c *contestant) quiet(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, quietTimeout)
	defer cancel()
	for _, admin := range c.idle {
		for {
			b, err := get(ctx, "http://"+admin+"/writeback")
			var s cluster.WritebackStatus
			if err == nil {
				err = json.Unmarshal(b, &s)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			if s.Pending == 0 && s.Names == 0 {
				break
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("%s still has %d blobs and %d names to write back after %s", c.name, s.Pending, s.Names, quietTimeout)
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
	syscall.Sync()
	return nil
}

func get(ctx context.Context, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", url, resp.Status, b)
	}
	return b, err
}

// cpu is the CPU time of all processes in seconds, to a hundredth (proc(5), /proc/pid/stat fields 14 and 15).
func (c *contestant) cpu() (sum float64) {
	for _, p := range c.procs {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
		if err != nil {
			continue // ended; the measurement fails by itself
		}
		f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
		for _, i := range []int{11, 12} {
			if i < len(f) {
				ticks, _ := strconv.ParseFloat(string(f[i]), 64)
				sum += ticks / 100
			}
		}
	}
	return sum
}

// stop ends the processes, the last started first, and kills what does not end.
func (c *contestant) stop() error {
	var errs []error
	for i := len(c.procs) - 1; i >= 0; i-- {
		p := c.procs[i]
		if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
			errs = append(errs, err)
		}
		select {
		case <-p.done:
		case <-time.After(stopTimeout):
			errs = append(errs, fmt.Errorf("%s of %s did not end and was killed", p.name, c.name), p.cmd.Process.Kill())
			<-p.done
		}
	}
	return errors.Join(errs...)
}

// freePorts finds ports of loopback below the range from which the system takes those of outgoing connections.
func freePorts(n int) (out []string, err error) {
	for port := 20_000; port < 30_000 && len(out) < n; port++ {
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
		l, err := net.Listen("tcp", addr)
		if err != nil {
			continue
		}
		defer l.Close()
		out = append(out, addr)
	}
	if len(out) < n {
		return nil, errors.New("no free ports between 20000 and 30000")
	}
	return out, nil
}

// peaks is the highest peak of memory of each process, in MiB, by contestant and process.
type peaks map[[2]string]float64

func (ps peaks) add(cs []*contestant) error {
	for _, c := range cs {
		for _, p := range c.procs {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
			if err != nil {
				text, _ := os.ReadFile(p.log)
				return fmt.Errorf("%s of %s ended: %w; the end of its log:\n%s", p.name, c.name, err, text[max(0, len(text)-4000):])
			}
			_, rest, ok := bytes.Cut(b, []byte("VmHWM:"))
			f := bytes.Fields(rest)
			if !ok || len(f) == 0 {
				return fmt.Errorf("%s of %s ended", p.name, c.name)
			}
			kib, err := strconv.ParseFloat(string(f[0]), 64)
			if err != nil {
				return err
			}
			key := [2]string{c.name, p.name}
			ps[key] = max(ps[key], kib/1024)
		}
	}
	return nil
}

const rowMemory = "peak memory"

func (ps peaks) rows() (out []report.Row) {
	keys := slices.SortedFunc(maps.Keys(ps), func(a, b [2]string) int { return strings.Compare(a[0]+" "+a[1], b[0]+" "+b[1]) })
	for _, k := range keys {
		params := map[string]any{"registry": k[0], "process": k[1]}
		if k[0] == rival {
			out = append(out, report.Plain(rowMemory, params, ps[k], "MiB", nil))
			continue
		}
		out = append(out, report.Below(rowMemory, params, ps[k], "MiB", memoryMiB, nil))
	}
	return out
}
