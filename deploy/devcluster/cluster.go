package devcluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"text/tabwriter"
	"time"
)

// runner runs components: processes or containers.
type runner interface {
	// start returns a handle that alive and stop take.
	start(ctx context.Context, cl *Cluster, c *Component) (handle string, err error)
	alive(ctx context.Context, c *Component) bool
	// stop returns when the component is gone. kill skips the graceful part.
	stop(ctx context.Context, c *Component, kill bool) error
}

// startTimeout bounds how long a component may take until it is ready.
const startTimeout = 25 * time.Second

// Up starts everything and waits until it is ready, or leaves nothing behind. What becomes ready is told to out.
func (cl *Cluster) Up(ctx context.Context, out io.Writer) (err error) {
	if old, err := Load(Options{Dir: cl.Dir, Bin: cl.Bin, Runtime: cl.Runtime}); err == nil {
		for _, c := range old.Components {
			if c.Handle != "" && old.rt.alive(ctx, c) {
				return fmt.Errorf("a cluster of %s is running already (%s is alive): end it with `make stop-devcluster`", cl.Dir, c.Name)
			}
		}
	}
	if err := cl.checkPorts(); err != nil {
		return err
	}
	if err := cl.Write(); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			if derr := cl.Down(context.WithoutCancel(ctx), io.Discard); derr != nil {
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
		if err := cl.Await(ctx, c, startTimeout); err != nil {
			return err
		}
		fmt.Fprintf(out, "  %-22s ready after %4.1f s   %s\n", c.Name, time.Since(began).Seconds(), cl.URL(c))
	}
	return cl.awaitNames(ctx)
}

// awaitNames waits until build-index knows its names, which it does soon after it is ready: until then lists, and what
// it does not know, are 503.
func (cl *Cluster) awaitNames(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for _, c := range cl.Role("build-index") {
		for {
			s, err := cl.writeback(ctx, c)
			if err == nil && s.Names == 0 {
				break
			}
			select {
			case <-ctx.Done():
				return errors.Join(fmt.Errorf("%s does not know its names after %s; the end of its log:\n%s", c.Name, startTimeout, cl.Tail(context.WithoutCancel(ctx), c)), err)
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	return nil
}

// Await waits until a component is ready, for at most limit. One that ends is reported at once, with the end of its
// log.
func (cl *Cluster) Await(ctx context.Context, c *Component, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		last := cl.Ready(ctx, c)
		if last == nil {
			return nil
		}
		if !cl.rt.alive(ctx, c) && ctx.Err() == nil {
			return fmt.Errorf("%s ended while starting; the end of its log:\n%s", c.Name, cl.Tail(ctx, c))
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready after %s (%w); the end of its log:\n%s", c.Name, limit, last, cl.Tail(context.WithoutCancel(ctx), c))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Ready asks a component whether it is ready; an error says what it answered instead. It takes 3 s at most.
func (cl *Cluster) Ready(ctx context.Context, c *Component) error {
	_, err := c.get(ctx, cl.probe(c))
	return err
}

// get reads a URL of a component, from where the component is, in 3 s and 64 KiB at most.
func (c *Component) get(ctx context.Context, url string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	hc := http.DefaultClient
	if c.Namespace != "" {
		hc = c.Host().Client()
		defer hc.CloseIdleConnections()
	}
	resp, err := hc.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, b)
	}
	return b, err
}

// Down stops in reverse order whatever Up started, and forgets it. Files stay.
func (cl *Cluster) Down(ctx context.Context, out io.Writer) error {
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

// Status prints a table of the components: addresses, and whether each is alive and ready.
func (cl *Cluster) Status(ctx context.Context, out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "COMPONENT\tADDRESS\tADMIN\tPEER\tSTATE\tHANDLE")
	for _, c := range cl.Components {
		state := "stopped"
		if cl.Alive(ctx, c) {
			state = "ready"
			if err := cl.Ready(ctx, c); err != nil {
				state = "not ready: " + err.Error()
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", c.Name, c.Addr, c.Admin, c.Peer, state, c.Handle)
	}
	return w.Flush()
}

// Alive says whether a component was started and runs.
func (cl *Cluster) Alive(ctx context.Context, c *Component) bool {
	return c.Handle != "" && cl.rt.alive(ctx, c)
}

// Stop ends a component by SIGTERM and waits until it is gone; one that does not drain in time is killed.
func (cl *Cluster) Stop(ctx context.Context, name string) error { return cl.end(ctx, name, false) }

// Kill ends a component at once, by SIGKILL.
func (cl *Cluster) Kill(ctx context.Context, name string) error { return cl.end(ctx, name, true) }

// KillAll ends every component at once, in reverse order, for tests that have nothing to drain.
func (cl *Cluster) KillAll(ctx context.Context) error {
	var errs []error
	for _, c := range slices.Backward(cl.Components) {
		errs = append(errs, cl.end(ctx, c.Name, true))
	}
	return errors.Join(errs...)
}

func (cl *Cluster) end(ctx context.Context, name string, kill bool) error {
	c, err := cl.Find(name)
	if err != nil || c.Handle == "" {
		return err
	}
	if err := cl.rt.stop(ctx, c, kill); err != nil {
		return fmt.Errorf("stop %s: %w", c.Name, err)
	}
	c.Handle = ""
	return cl.save()
}

// Start starts a stopped component again, as it is configured, and waits until it is ready.
func (cl *Cluster) Start(ctx context.Context, name string) error {
	c, err := cl.Find(name)
	if err != nil {
		return err
	}
	if cl.Alive(ctx, c) {
		return fmt.Errorf("%s is running already", c.Name)
	}
	if c.Handle, err = cl.rt.start(ctx, cl, c); err != nil {
		return fmt.Errorf("start %s: %w", c.Name, err)
	}
	if err := cl.save(); err != nil {
		return err
	}
	return cl.Await(ctx, c, startTimeout)
}

// Wipe empties the disk of a stopped component, as a machine that replaces a lost one comes with an empty one. The
// folder itself stays: it may be a mount point.
func (cl *Cluster) Wipe(name string) error {
	c, err := cl.Find(name)
	if err != nil {
		return err
	}
	if cl.Alive(context.Background(), c) {
		return fmt.Errorf("%s is running: stop it first", c.Name)
	}
	entries, err := os.ReadDir(cl.StateDir(c))
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(cl.StateDir(c), e.Name())))
	}
	return err
}

// StateDir is what a component writes to. It differs by runtime: containers run as another user, who can't use a
// process's files.
func (cl *Cluster) StateDir(c *Component) string {
	return filepath.Join(cl.Dir, c.Name, "state-"+cl.Runtime)
}

// ConfigPath is a component's configuration file; testfs has none.
func (cl *Cluster) ConfigPath(c *Component) string {
	return filepath.Join(cl.Dir, c.Name, "config.yaml")
}

// LogPath is where a process logs to; a container's log is docker's.
func (cl *Cluster) LogPath(c *Component) string { return filepath.Join(cl.Dir, c.Name, "log") }

// makeStateDir makes the folder that the component writes to. Containers run as another user, to whom it must belong.
func (cl *Cluster) makeStateDir(c *Component) error {
	dir := cl.StateDir(c)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// The configuration is in the folder above, which the runtime before may have made.
	above := os.FileMode(0o700)
	if cl.Runtime == "docker" {
		above = 0o755
	}
	if err := os.Chmod(filepath.Dir(dir), above); err != nil {
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

// Tail is the last part of a component's log, or why it can't be read.
func (cl *Cluster) Tail(ctx context.Context, c *Component) string {
	const max = 3000
	b, err := os.ReadFile(cl.LogPath(c))
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
