package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"text/tabwriter"
	"time"

	"kraken/proto/transport"
)

type options struct {
	dir, bin, runtime string
	agents            int
}

// component is one process or container. It is written to the state file, so that later commands find what up started.
type component struct {
	Name   string `json:"name"`
	Role   string `json:"role"`
	Addr   string `json:"addr"`            // registry or main listener
	Admin  string `json:"admin,omitempty"` // admin listener
	Peer   string `json:"peer,omitempty"`
	Handle string `json:"handle,omitempty"` // of the runtime: pid and its start time, or container id
}

// probe is where readiness is asked.
func (c *component) probe() string { return "http://" + c.Addr + "/readiness" }

func (c *component) ports() []string {
	var out []string
	for _, a := range []string{c.Addr, c.Admin, c.Peer} {
		if a != "" {
			out = append(out, a)
		}
	}
	return out
}

// runtime runs components.
type runtime interface {
	// start returns a handle that alive and stop take.
	start(ctx context.Context, cl *cluster, c *component) (handle string, err error)
	alive(ctx context.Context, c *component) bool
	// stop returns when the component is gone. kill skips the graceful part.
	stop(ctx context.Context, c *component, kill bool) error
}

// cluster is the plan and the state of a dev cluster, in the order in which components start.
type cluster struct {
	Runtime    string       `json:"runtime"`
	Components []*component `json:"components"`
	Dir        string       `json:"-"`
	Bin        string       `json:"-"`
	rt         runtime
}

const stateFile = "cluster.json"

// errNone is that up has started nothing, or down has ended it.
var errNone = errors.New("no cluster is running")

// startTimeout bounds how long a component may take until it is ready.
const startTimeout = 25 * time.Second

// plan lays out a new cluster; the ports are those of the design, all on loopback.
func plan(o options) (*cluster, error) {
	if o.agents < 0 {
		return nil, fmt.Errorf("--agents %d: must not be negative", o.agents)
	}
	cl, err := newCluster(o)
	if err != nil {
		return nil, err
	}
	add := func(name, role string, port, admin, peer int) {
		at := func(p int) string {
			if p == 0 {
				return ""
			}
			return net.JoinHostPort("127.0.0.1", strconv.Itoa(p))
		}
		cl.Components = append(cl.Components, &component{Name: name, Role: role, Addr: at(port), Admin: at(admin), Peer: at(peer)})
	}
	add("kraken-testfs-01", "testfs", 16050, 0, 0)
	for i := 1; i <= 3; i++ {
		add(fmt.Sprintf("kraken-origin-%02d", i), "origin", 16030+i, 16033+i, 16040+i)
	}
	add("kraken-tracker-01", "tracker", 16020, 16021, 0)
	add("kraken-build-index-01", "build-index", 16010, 16011, 0)
	add("kraken-proxy-01", "proxy", 16000, 16001, 0)
	for i := 1; i <= o.agents; i++ {
		base := 16051 + 10*i
		name := fmt.Sprintf("kraken-agent-%02d", i)
		if i <= 4 {
			add(name, "agent", base, base+2, base+1)
			continue
		}
		free, err := freePorts(3)
		if err != nil {
			return nil, err
		}
		add(name, "agent", free[0], free[2], free[1])
	}
	return cl, nil
}

func newCluster(o options) (*cluster, error) {
	dir, err := filepath.Abs(o.dir)
	if err != nil {
		return nil, err
	}
	bin, err := filepath.Abs(o.bin)
	if err != nil {
		return nil, err
	}
	cl := &cluster{Runtime: o.runtime, Dir: dir, Bin: bin}
	return cl, cl.setRuntime()
}

func (cl *cluster) setRuntime() error {
	switch cl.Runtime {
	case "process":
		cl.rt = processes{}
	case "docker":
		cl.rt = containers{}
	default:
		return fmt.Errorf("--runtime %q: want process or docker", cl.Runtime)
	}
	return nil
}

// load reads the cluster that up started.
func load(o options) (*cluster, error) {
	cl, err := newCluster(o)
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(filepath.Join(cl.Dir, stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w in %s: start one with `make devcluster`", errNone, cl.Dir)
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, cl); err != nil {
		return nil, fmt.Errorf("read %s: %w", filepath.Join(cl.Dir, stateFile), err)
	}
	return cl, cl.setRuntime()
}

func (cl *cluster) save() error {
	b, err := json.MarshalIndent(cl, "", "  ")
	if err != nil {
		return err
	}
	tmp := filepath.Join(cl.Dir, stateFile+".new")
	if err := os.WriteFile(tmp, append(b, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(cl.Dir, stateFile))
}

func freePorts(n int) ([]int, error) {
	var out []int
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, fmt.Errorf("find a free port: %w", err)
		}
		defer l.Close()
		out = append(out, l.Addr().(*net.TCPAddr).Port)
	}
	return out, nil
}

// up starts everything or leaves nothing behind.
func (cl *cluster) up(ctx context.Context, out io.Writer) (err error) {
	if old, err := load(options{dir: cl.Dir, bin: cl.Bin, runtime: cl.Runtime}); err == nil {
		for _, c := range old.Components {
			if c.Handle != "" && old.rt.alive(ctx, c) {
				return fmt.Errorf("a cluster of %s is running already (%s is alive): end it with `make stop-devcluster`", cl.Dir, c.Name)
			}
		}
	}
	if err := cl.checkPorts(); err != nil {
		return err
	}
	if err := os.MkdirAll(cl.Dir, 0o755); err != nil {
		return err
	}
	if err := cl.writeConfigs(); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			if derr := cl.down(context.WithoutCancel(ctx), io.Discard); derr != nil {
				err = errors.Join(err, derr)
			}
		}
	}()
	began := time.Now()
	for _, c := range cl.Components {
		if c.Handle, err = cl.rt.start(ctx, cl, c); err != nil {
			return fmt.Errorf("start %s: %w", c.Name, err)
		}
		if err := cl.save(); err != nil {
			return err
		}
	}
	for _, c := range cl.Components {
		if err := cl.await(ctx, c); err != nil {
			return err
		}
		fmt.Fprintf(out, "  %-22s ready after %4.1f s   http://%s\n", c.Name, time.Since(began).Seconds(), c.Addr)
	}
	cl.hints(out)
	return nil
}

// checkPorts names every port that is taken, and who has it where that can be known.
func (cl *cluster) checkPorts() error {
	var errs []error
	for _, c := range cl.Components {
		for _, a := range c.ports() {
			l, err := net.Listen("tcp", a)
			if err != nil {
				who := transport.PortOwner(a)
				if who == "" {
					who = "another process"
				}
				errs = append(errs, fmt.Errorf("port %s, needed by %s, is taken by %s", a, c.Name, who))
				continue
			}
			l.Close()
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("%w\nnothing was started; end what holds the ports, or an earlier cluster with `make stop-devcluster`", errors.Join(errs...))
	}
	return nil
}

// await polls readiness. A component that ends is reported at once, with the end of its log.
func (cl *cluster) await(ctx context.Context, c *component) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		last := ready(ctx, c)
		if last == nil {
			return nil
		}
		if !cl.rt.alive(ctx, c) && ctx.Err() == nil {
			return fmt.Errorf("%s ended while starting; the end of its log:\n%s", c.Name, cl.tail(ctx, c))
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready after %s (%w); the end of its log:\n%s", c.Name, startTimeout, last, cl.tail(context.WithoutCancel(ctx), c))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func ready(ctx context.Context, c *component) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.probe(), nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<12))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", resp.Status, b)
	}
	return nil
}

// down stops in reverse order whatever up started, and forgets it.
func (cl *cluster) down(ctx context.Context, out io.Writer) error {
	var errs []error
	for i := len(cl.Components) - 1; i >= 0; i-- {
		c := cl.Components[i]
		if c.Handle == "" {
			continue
		}
		if err := cl.rt.stop(ctx, c, false); err != nil {
			errs = append(errs, fmt.Errorf("stop %s: %w", c.Name, err))
			continue
		}
		c.Handle = ""
		fmt.Fprintf(out, "  %-22s stopped\n", c.Name)
	}
	if len(errs) > 0 {
		return errors.Join(append(errs, cl.save())...)
	}
	err := os.Remove(filepath.Join(cl.Dir, stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (cl *cluster) status(ctx context.Context, out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "COMPONENT\tADDRESS\tADMIN\tPEER\tSTATE\tHANDLE")
	for _, c := range cl.Components {
		state := "stopped"
		if c.Handle != "" && cl.rt.alive(ctx, c) {
			state = "ready"
			if err := ready(ctx, c); err != nil {
				state = "not ready: " + err.Error()
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", c.Name, c.Addr, c.Admin, c.Peer, state, c.Handle)
	}
	return w.Flush()
}

func (cl *cluster) find(name string) (*component, error) {
	for _, c := range cl.Components {
		if c.Name == name || c.Name == "kraken-"+name {
			return c, nil
		}
	}
	return nil, fmt.Errorf("no component %q; `devcluster status` lists them", name)
}

func (cl *cluster) stopOne(ctx context.Context, name string, kill bool) error {
	c, err := cl.find(name)
	if err != nil || c.Handle == "" {
		return err
	}
	if err := cl.rt.stop(ctx, c, kill); err != nil {
		return fmt.Errorf("stop %s: %w", c.Name, err)
	}
	c.Handle = ""
	return cl.save()
}

func (cl *cluster) startOne(ctx context.Context, name string) error {
	c, err := cl.find(name)
	if err != nil {
		return err
	}
	if c.Handle != "" && cl.rt.alive(ctx, c) {
		return fmt.Errorf("%s is running already", c.Name)
	}
	if c.Handle, err = cl.rt.start(ctx, cl, c); err != nil {
		return fmt.Errorf("start %s: %w", c.Name, err)
	}
	if err := cl.save(); err != nil {
		return err
	}
	return cl.await(ctx, c)
}

// wipe removes a component's disk, as a lost machine would.
func (cl *cluster) wipe(name string) error {
	c, err := cl.find(name)
	if err != nil {
		return err
	}
	if c.Handle != "" && cl.rt.alive(context.Background(), c) {
		return fmt.Errorf("%s is running: stop it first", c.Name)
	}
	if err := os.RemoveAll(cl.stateDir(c)); err != nil {
		return err
	}
	return cl.makeStateDir(c)
}

// stateDir differs by runtime: containers run as another user, who can't use a process's files.
func (cl *cluster) stateDir(c *component) string {
	return filepath.Join(cl.Dir, c.Name, "state-"+cl.Runtime)
}

func (cl *cluster) configPath(c *component) string {
	return filepath.Join(cl.Dir, c.Name, "config.yaml")
}
func (cl *cluster) logPath(c *component) string { return filepath.Join(cl.Dir, c.Name, "log") }

// makeStateDir makes the folder that the component writes to. Containers run as another user, to whom it must belong.
func (cl *cluster) makeStateDir(c *component) error {
	dir := cl.stateDir(c)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if cl.Runtime == "docker" && os.Geteuid() == 0 {
		return os.Chown(dir, containerUser, containerUser)
	}
	if cl.Runtime == "docker" {
		return os.Chmod(dir, 0o777)
	}
	return nil
}

// tail is the last part of a component's log.
func (cl *cluster) tail(ctx context.Context, c *component) string {
	const max = 2000
	b, err := os.ReadFile(cl.logPath(c))
	if cl.Runtime == "docker" {
		b, err = containers{}.logs(ctx, c)
	}
	if err != nil {
		return err.Error()
	}
	if len(b) > max {
		b = b[len(b)-max:]
	}
	return string(b)
}
