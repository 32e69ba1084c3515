package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"time"

	"kraken/deploy/devcluster"
)

// kind is one kind of fault.
type kind struct {
	name  string
	roles []string
	alone bool // needs namespaces and root
	// quiet kinds lose a disk: nothing may be owed that was on the disk lost before.
	quiet bool
	begin func(context.Context, *rig, *devcluster.Component) error
	// end heals. It returns when the component was started again, as far as it was.
	end func(context.Context, *rig, *devcluster.Component) error
}

// kinds are all kinds of faults, by name.
var kinds = []kind{
	{
		name: "kill", roles: []string{"origin", "tracker", "build-index", "proxy", "agent", "testfs"},
		begin: func(ctx context.Context, r *rig, c *devcluster.Component) error { return r.plan.Kill(ctx, c.Name) },
		end:   restart,
	},
	{
		name: "restart", roles: []string{"origin", "tracker", "build-index", "proxy", "agent"},
		begin: func(ctx context.Context, r *rig, c *devcluster.Component) error { return r.plan.Stop(ctx, c.Name) },
		end:   restart,
	},
	{
		name: "hang", roles: []string{"origin", "tracker", "build-index", "proxy", "agent", "testfs"},
		begin: signal(syscall.SIGSTOP), end: signal(syscall.SIGCONT),
	},
	{
		name: "cut", roles: []string{"origin", "tracker", "build-index", "testfs"}, alone: true,
		begin: func(ctx context.Context, r *rig, c *devcluster.Component) error { return r.cut(ctx, c, true) },
		end:   func(ctx context.Context, r *rig, c *devcluster.Component) error { return r.cut(ctx, c, false) },
	},
	{
		name: "full", roles: []string{"origin", "build-index", "agent"}, alone: true,
		begin: func(_ context.Context, r *rig, c *devcluster.Component) error { return r.fill(c) },
		end:   func(_ context.Context, r *rig, c *devcluster.Component) error { return r.empty(c) },
	},
	{
		name: "wipe", roles: []string{"origin", "build-index", "agent"}, quiet: true,
		begin: func(ctx context.Context, r *rig, c *devcluster.Component) error {
			if err := r.plan.Kill(ctx, c.Name); err != nil {
				return err
			}
			return r.plan.Wipe(c.Name)
		},
		end: restart,
	},
}

// restart starts a component that was ended, and waits until it is ready.
func restart(ctx context.Context, r *rig, c *devcluster.Component) error {
	return r.plan.Start(ctx, c.Name)
}

func signal(s syscall.Signal) func(context.Context, *rig, *devcluster.Component) error {
	return func(_ context.Context, _ *rig, c *devcluster.Component) error {
		pid := c.PID()
		if pid == 0 {
			return fmt.Errorf("%s does not run", c.Name)
		}
		return syscall.Kill(pid, s)
	}
}

// fault is one fault that will happen.
type fault struct {
	kind
	part *devcluster.Component
	hold time.Duration // between its begin and its end
}

func (f fault) String() string { return f.name + " " + f.part.Name }

// single reports whether the cluster must not fail any request because of f: another part can do the work.
func (f fault) single() bool {
	return f.part.Role == "origin" || f.part.Role == "tracker" || f.part.Role == "testfs"
}

// draw returns the next fault of a seed.
func draw(rng *rand.Rand, r *rig, wanted func(kind, role string) bool) (fault, error) {
	var all []fault
	for _, k := range kinds {
		if k.alone && !r.alone {
			continue
		}
		for _, role := range k.roles {
			if !wanted(k.name, role) {
				continue
			}
			parts := r.plan.Role(role)
			all = append(all, fault{kind: k, part: parts[rng.IntN(len(parts))], hold: time.Second + time.Duration(rng.Int64N(int64(5*time.Second)))})
		}
	}
	if len(all) == 0 {
		return fault{}, errors.New("no kind of fault is left to draw: see the names in test/chaos/faults.go")
	}
	return all[rng.IntN(len(all))], nil
}
