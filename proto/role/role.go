// Package role is what the five roles have in common as processes: their command line, the configuration that each has,
// the log, the metrics, and the order in which they open, run and end. It knows nothing of what any of them does.
package role

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/cluster"
	"kraken/proto/transport"
)

// Deps is what a process gives to its role.
type Deps struct {
	Log      *slog.Logger
	Registry *prometheus.Registry
	// Die ends the process at once, with why and the stacks of all goroutines in its log: for one that hangs, which
	// can't drain. It calls last between looking at the stacks and writing them. Nil in tests.
	Die func(why error, last func())
}

// Runner is a role that is open.
type Runner interface {
	// Run serves until ctx is done, then drains and closes. It is called once.
	Run(ctx context.Context) error
}

// Chassis is what every role stands on: it opens in order, undoes in reverse what a failed start had opened, listens,
// runs, drains and closes. A role embeds it.
type Chassis struct {
	Deps
	// Health is what readiness asks. It turns false when the role drains.
	Health *transport.Health
	// Client is how the role speaks to others.
	Client *http.Client
	// Origins are all of the cluster.
	Origins *cluster.Origins

	role          transport.Role
	identities    cluster.Identities
	refused       *refusals
	certificates  *transport.Expiry
	admin, server *transport.Server
	adminConfig   transport.ServerConfig
	serverConfig  transport.ServerConfig
	parts         Group
	undo          []func() error // of a failed start
	closers       []func() error // of every end, after Run

	ctx  context.Context // of work in the background
	stop context.CancelFunc
	mu   sync.Mutex // guards the begin of work in the background against its end
	wg   sync.WaitGroup
}

// Open builds a chassis from a valid configuration and lets assemble put the role on it, which ends with Serve. stall
// is the patience with one origin, see cluster.NewOrigins. When assemble fails, what it has opened is closed again.
func Open(cfg Config, deps Deps, stall time.Duration, assemble func(*Chassis) error) error {
	c := &Chassis{Deps: deps, Health: transport.NewHealth(), adminConfig: cfg.Admin, serverConfig: cfg.Server, role: cfg.Role, identities: cfg.Identities()}
	c.refused = c.newRefusals()
	c.certificates = transport.NewExpiry(c.Log, c.Registry)
	c.WatchCertificates(cfg.Server.TLS.Cert, cfg.Server.TLS.ClientCA, cfg.Admin.TLS.Cert, cfg.Admin.TLS.ClientCA, cfg.Client.Cert, cfg.Client.CA)
	c.Health.AddCheck("certificates", false, c.certificates.Check)
	c.Part("certificates", c.certificates.Run)
	c.ctx, c.stop = context.WithCancel(context.Background())
	if err := c.connect(cfg, stall); err != nil {
		c.stop()
		return err
	}
	err := assemble(c)
	if err == nil {
		return nil
	}
	return errors.Join(err, c.Close())
}

// Close closes a role that was opened and does not run: what was opened last first.
func (c *Chassis) Close() error {
	c.quiet()
	c.Origins.Close()
	var errs []error
	for i := len(c.undo) - 1; i >= 0; i-- {
		errs = append(errs, c.undo[i]())
	}
	return errors.Join(errs...)
}

// connect makes the clients. It touches no network.
func (c *Chassis) connect(cfg Config, stall time.Duration) (err error) {
	if c.Client, err = transport.NewClient(cfg.Client, c.Log); err != nil {
		return fmt.Errorf("client: %w", err)
	}
	c.Origins, err = cluster.NewOrigins(cfg.Origins, cfg.Replicas, stall, c.Client)
	return err
}

// WatchCertificates has files of certificates warned of before they expire; empty names are none.
func (c *Chassis) WatchCertificates(files ...string) { c.certificates.Watch(files...) }

// Undo adds what closes something if the start fails. The last added is the first called.
func (c *Chassis) Undo(f func() error) { c.undo = append(c.undo, f) }

// Closes adds what closes something at every end of the role: when the start fails, or after Run. The last added is the
// first called.
func (c *Chassis) Closes(f func() error) {
	c.Undo(f)
	c.closers = append(c.closers, f)
}

// Part adds what Run runs. Parts end in the reverse order, after the listeners, see Group.
func (c *Chassis) Part(name string, run func(context.Context) error) { c.parts.Add(name, run) }

// Background runs f until it returns, with a context that ends when the role does. It returns false, and does not run
// f, once that has begun.
func (c *Chassis) Background(f func(context.Context)) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return false
	}
	c.wg.Go(func() { f(c.ctx) })
	return true
}

// Context is that of work in the background: it ends when the role does.
func (c *Chassis) Context() context.Context { return c.ctx }

// EndBackground is a part that ends the work in the background, and is done when that is: parts that were added before
// it are there until then.
func (c *Chassis) EndBackground(ctx context.Context) error {
	<-ctx.Done()
	c.quiet()
	return nil
}

// quiet ends the work in the background and waits for it.
func (c *Chassis) quiet() {
	c.mu.Lock()
	c.stop()
	c.mu.Unlock()
	c.wg.Wait()
}

// Serve binds the main listener, which is called name, and the admin listener where one is configured. admin, which may
// be nil, is what the admin listener has beside health and metrics; control is what it has for those who may change the
// process. It is the last step of an open.
// A listener that asks for certificates is behind cluster.Rights.
func (c *Chassis) Serve(name string, h http.Handler, admin func(*http.ServeMux), control ...func(*http.ServeMux)) (err error) {
	descriptors := transport.NewDescriptors()
	c.Health.AddCheck("file descriptors", false, func(context.Context) error { return descriptors.Check() })
	if c.server, err = transport.NewServer(name, c.serverConfig, c.guarded(string(c.role), c.serverConfig, h), c.Log); err != nil {
		return err
	}
	c.Undo(c.server.Close)
	if c.adminConfig.Listen != "" {
		m := transport.AdminHandler(c.adminConfig, c.Health, c.Registry, control...)
		if admin != nil {
			admin(m)
		}
		if c.admin, err = transport.NewServer("admin", c.adminConfig, c.guarded(cluster.Admin, c.adminConfig, m), c.Log); err != nil {
			return err
		}
		c.Undo(c.admin.Close)
		c.Part("admin", c.admin.Run)
	}
	c.Part(name, c.server.Run)
	return nil
}

// Abort closes the listeners and all connections at once, for a role that hangs.
func (c *Chassis) Abort() {
	_ = c.server.Abort() // whatever does not close, the process ends
	if c.admin != nil {
		_ = c.admin.Abort()
	}
}

// Addr is the address of the main listener.
func (c *Chassis) Addr() string { return c.server.Addr() }

// URL is where the main listener is reached, see transport.Server.
func (c *Chassis) URL() string { return c.server.URL() }

// AdminAddr is the address of the admin listener, empty when there is none.
func (c *Chassis) AdminAddr() string {
	if c.admin == nil {
		return ""
	}
	return c.admin.Addr()
}

// Run serves until ctx is done, then drains: readiness turns false, requests in flight finish within the server's
// bound, parts and work in the background end, and what was opened is closed.
func (c *Chassis) Run(ctx context.Context) error {
	c.parts.Add("readiness", func(ctx context.Context) error {
		<-ctx.Done()
		c.Health.SetDraining()
		return nil
	})
	err := c.parts.Run(ctx)
	c.quiet()
	c.Origins.Close()
	for i := len(c.closers) - 1; i >= 0; i-- {
		err = errors.Join(err, c.closers[i]())
	}
	return err
}
