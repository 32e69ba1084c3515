package chaos

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"kraken/deploy/devcluster"
)

const (
	diskSize   = 384 << 20 // of the file system of each component
	capacity   = "160MiB"  // of the stores on them
	readyLimit = 90 * time.Second
)

// rig is a cluster of real processes that faults happen to. One goroutine uses it.
type rig struct {
	plan   *devcluster.Cluster
	alone  bool              // in namespaces of its own, as root: networks can be cut and disks filled
	mounts []string          // in the order in which they were made
	disks  map[string]string // component → folder of its file system
}

// open starts a cluster with two agents in dir. close must be called, also after an error.
func open(ctx context.Context, dir, bin string, alone bool) (*rig, error) {
	plan, err := devcluster.Plan(devcluster.Options{
		Dir: dir, Bin: bin, Agents: 2, FreePorts: true, Bound: true,
		Config: map[string]map[string]any{
			"origin": {"capacity": capacity}, "agent": {"cache": map[string]any{"capacity": capacity}},
		},
	})
	if err != nil {
		return nil, err
	}
	r := &rig{plan: plan, alone: alone, disks: map[string]string{}}
	if alone {
		for _, c := range plan.Components {
			if c.Role == "origin" || c.Role == "agent" || c.Role == "build-index" {
				if err := r.disk(ctx, c); err != nil {
					return r, err
				}
			}
		}
	}
	return r, plan.Up(ctx, io.Discard)
}

// disk makes a file system for a component and puts the component's state on it.
func (r *rig) disk(ctx context.Context, c *devcluster.Component) error {
	at := filepath.Join(r.plan.Dir, "disks", c.Name)
	file := at + ".img"
	if err := os.MkdirAll(at, 0o700); err != nil {
		return err
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(diskSize), f.Close()); err != nil {
		return err
	}
	if err := run(ctx, "mkfs.ext4", "-q", "-O", "^has_journal", file); err != nil {
		return err
	}
	if err := r.mount(ctx, at, "-o", "loop", file, at); err != nil {
		return err
	}
	state, target := filepath.Join(at, "state"), r.plan.StateDir(c)
	if err := errors.Join(os.Mkdir(state, 0o700), os.MkdirAll(target, 0o700)); err != nil {
		return err
	}
	r.disks[c.Name] = at
	return r.mount(ctx, target, "--bind", state, target)
}

func (r *rig) mount(ctx context.Context, at string, args ...string) error {
	if err := run(ctx, "mount", args...); err != nil {
		return err
	}
	r.mounts = append(r.mounts, at)
	return nil
}

func run(ctx context.Context, name string, args ...string) error {
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// close ends every process and takes the file systems away.
func (r *rig) close() error {
	errs := []error{r.plan.KillAll(context.Background())}
	for i := len(r.mounts) - 1; i >= 0; i-- {
		errs = append(errs, run(context.Background(), "umount", r.mounts[i]))
	}
	return errors.Join(errs...)
}

// cut drops, or with on false passes again, every packet to and from a component's listeners for data, without a FIN.
func (r *rig) cut(ctx context.Context, c *devcluster.Component, on bool) error {
	action := "-D"
	if on {
		action = "-I"
	}
	for _, addr := range []string{c.Addr, c.Peer} {
		if addr == "" {
			continue
		}
		_, port, err := net.SplitHostPort(addr)
		if err != nil {
			return err
		}
		for _, side := range []string{"--dport", "--sport"} {
			if err := run(ctx, "iptables", "-w", action, "INPUT", "-p", "tcp", side, port, "-j", "DROP"); err != nil {
				return err
			}
		}
	}
	return nil
}

// fill takes all that is free on a component's disk; empty gives it back.
func (r *rig) fill(c *devcluster.Component) error {
	f, err := os.Create(filepath.Join(r.disks[c.Name], "filler"))
	if err != nil {
		return err
	}
	block := make([]byte, 1<<20)
	for err == nil {
		_, err = f.Write(block)
		if err != nil && len(block) > 4096 {
			block, err = block[:4096], nil
		}
	}
	return f.Close()
}

func (r *rig) empty(c *devcluster.Component) error {
	return os.Remove(filepath.Join(r.disks[c.Name], "filler"))
}

// restored waits until build-index answers for a name that nobody has by "not found": while it restores names it can't.
func (r *rig) restored(ctx context.Context) error {
	end := time.Now().Add(readyLimit)
	c := r.plan.Role("build-index")[0]
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.plan.URL(c)+"/v2/chaos/nobody/manifests/none", nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusNotFound {
				return nil
			}
			err = errors.New(resp.Status)
		}
		if time.Now().After(end) {
			return fmt.Errorf("names are not restored after %s: %w", readyLimit, err)
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
}
