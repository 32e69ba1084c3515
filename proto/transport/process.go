package transport

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
)

// LogConfig configures a process's log.
type LogConfig struct {
	Format string `yaml:"format"` // text (default) or json
	Level  string `yaml:"level"`  // debug, info (default), warn or error
}

// NewLogger writes to w.
func NewLogger(w io.Writer, cfg LogConfig) (*slog.Logger, error) {
	var o slog.HandlerOptions
	if cfg.Level != "" {
		var l slog.Level
		if err := l.UnmarshalText([]byte(cfg.Level)); err != nil {
			return nil, fmt.Errorf("log.level %q: want debug, info, warn or error", cfg.Level)
		}
		o.Level = l
	}
	switch cfg.Format {
	case "", "text":
		return slog.New(slog.NewTextHandler(w, &o)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, &o)), nil
	}
	return nil, fmt.Errorf("log.format %q: want text or json", cfg.Format)
}

// version is set by the linker.
var version = "dev"

// Version is the version of this build, with its commit where the build knew it.
func Version() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return version + " (" + s.Value + ")"
			}
		}
	}
	return version
}

// Group runs the parts of a process together. The first one that fails ends all, one that is done just ends; they are ended in the reverse order of Add, one
// after the other, so that a part may rely on those before it until it is done itself.
type Group struct {
	names []string
	parts []func(context.Context) error
}

// Add adds a part. It must return soon after its context is done.
func (g *Group) Add(name string, run func(context.Context) error) {
	g.names, g.parts = append(g.names, name), append(g.parts, run)
}

// Run returns when every part has returned, with all their errors.
func (g *Group) Run(ctx context.Context) error {
	n := len(g.parts)
	if n == 0 {
		return nil
	}
	errs := make([]error, n)
	cancels := make([]context.CancelFunc, n)
	done := make([]chan struct{}, n)
	ended := make(chan struct{}) // a part has failed, or all are done
	var once sync.Once
	var left atomic.Int64
	left.Store(int64(n))
	for i, run := range g.parts {
		pctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		cancels[i], done[i] = cancel, make(chan struct{})
		go func() {
			defer close(done[i])
			if err := run(pctx); err != nil && !errors.Is(err, context.Canceled) {
				errs[i] = fmt.Errorf("%s: %w", g.names[i], err)
				once.Do(func() { close(ended) })
			}
			if left.Add(-1) == 0 {
				once.Do(func() { close(ended) })
			}
		}()
	}
	select {
	case <-ctx.Done():
	case <-ended:
	}
	for i := n - 1; i >= 0; i-- {
		cancels[i]()
		<-done[i]
	}
	return errors.Join(errs...)
}

// PortOwner names the process that listens on addr's port, empty when that can't be known (proc(5)).
func PortOwner(addr string) string {
	_, p, err := net.SplitHostPort(addr)
	if err != nil {
		return ""
	}
	port, err := strconv.ParseUint(p, 10, 16)
	if err != nil || port == 0 {
		return ""
	}
	inodes := map[string]bool{}
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		listeners(table, port, inodes)
	}
	fds, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return ""
	}
	for _, fd := range fds {
		target, err := os.Readlink(fd)
		if err != nil || !strings.HasPrefix(target, "socket:[") || !inodes[strings.Trim(target, "socket:[]")] {
			continue
		}
		pid := strings.Split(fd, "/")[2]
		name, err := os.ReadFile("/proc/" + pid + "/comm")
		if err != nil {
			continue
		}
		return fmt.Sprintf("process %s (%s)", pid, strings.TrimSpace(string(name)))
	}
	return ""
}

// listeners adds the inodes of sockets that listen on port.
func listeners(table string, port uint64, inodes map[string]bool) {
	f, err := os.Open(table)
	if err != nil {
		return
	}
	defer f.Close()
	const stateListen = "0A"
	for sc := bufio.NewScanner(f); sc.Scan(); {
		c := strings.Fields(sc.Text())
		if len(c) < 10 || c[3] != stateListen {
			continue
		}
		_, hex, _ := strings.Cut(c[1], ":")
		if n, err := strconv.ParseUint(hex, 16, 16); err == nil && n == port {
			inodes[c[9]] = true
		}
	}
}
