package devcluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// stopTimeout is how long a component may drain before it is killed.
const stopTimeout = 35 * time.Second

// processes runs components as children, which outlive this program unless bound. A handle is "<pid>:<start time>", so
// that a pid that was given to another program since is never signalled.
type processes struct{ bound bool }

func (p processes) start(_ context.Context, cl *Cluster, c *Component) (string, error) {
	log, err := os.OpenFile(cl.LogPath(c), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return "", err
	}
	defer log.Close()
	argv := c.Host().command(append([]string{filepath.Join(cl.Bin, "kraken-"+c.Role)}, cl.args(c)...)...)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), c.Env...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, filepath.Join(cl.Dir, c.Name)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if p.bound {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	pid := cmd.Process.Pid
	// Reaped here while this command lives, so that alive sees its end; afterwards init does it.
	go func() {
		if err := cmd.Wait(); err != nil && !p.bound {
			fmt.Fprintf(os.Stderr, "devcluster: %s: %v\n", c.Name, err)
		}
	}()
	began, _, err := beganAndState(pid)
	if err != nil {
		return "", fmt.Errorf("it ended at once; see %s", cl.LogPath(c))
	}
	return fmt.Sprintf("%d:%s", pid, began), nil
}

func (processes) pid(c *Component) (int, bool) {
	p, began, _ := strings.Cut(c.Handle, ":")
	pid, err := strconv.Atoi(p)
	if err != nil {
		return 0, false
	}
	now, state, err := beganAndState(pid)
	return pid, err == nil && now == began && state != "Z"
}

func (p processes) alive(_ context.Context, c *Component) bool {
	_, ok := p.pid(c)
	return ok
}

func (p processes) stop(ctx context.Context, c *Component, kill bool) error {
	pid, ok := p.pid(c)
	if !ok {
		return nil
	}
	sig := syscall.SIGTERM
	if kill {
		sig = syscall.SIGKILL
	}
	if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("signal pid %d: %w", pid, err)
	}
	limit := time.After(stopTimeout)
	for p.alive(ctx, c) {
		select {
		case <-limit:
			if kill {
				return fmt.Errorf("pid %d does not end", pid)
			}
			return p.stop(ctx, c, true)
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}
