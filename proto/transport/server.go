// Package transport is HTTP between roles, both ends: listeners with TLS that reloads, clients that give up on lack of
// progress and never on length, draining, health and metrics. It knows no route and no message.
package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"kraken/proto/config"
)

// ServerConfig configures one listener.
type ServerConfig struct {
	// Listen is host:port. Port 0 takes a free one.
	Listen string `yaml:"listen"`
	// Advertise is the host:port that others reach this listener at, default the listener's own. In the place of host,
	// or alone, it may be the name of a network interface: its first global address, IPv4 first, and the listener's
	// port where none is given.
	Advertise string `yaml:"advertise"`
	// TLS makes the listener speak TLS; without a certificate it is plain HTTP.
	TLS TLS `yaml:"tls"`
	// CongestionControl of the connections that come in here: a name (TCP_CONGESTION of tcp(7)), "system" for what the
	// system uses, or "auto" for the same but cubic in place of BBR on paths shorter than 10 ms. Default "auto" at an
	// origin's registry API, else "system".
	CongestionControl string `yaml:"congestion_control"`
	// DrainTimeout is how long requests in flight may take after the end was asked for, default 30s.
	DrainTimeout config.Duration `yaml:"drain_timeout"`
	// LeastRate is how slowly a client may send a request's body, in bytes a second averaged over a minute, default
	// 1KiB/s. Slower ones are answered 408. A request's whole length is not limited.
	LeastRate config.Rate `yaml:"least_rate"`
	// Hosts are further names that clients reach this listener by, "*" for every name: an agent's registry, the
	// tracker's page and all admin listeners answer only for these, localhost, the names in Listen and Advertise, and
	// the address that a connection came to.
	Hosts []string `yaml:"hosts"`
	// Control, of an admin listener, turns on what changes the process (limits, pins, scrub), for clients on this
	// machine and for ones with a certificate of TLS.ClientCA. Default off.
	Control bool `yaml:"control"`
	// Open, of an admin listener without TLS, lets whoever reaches it read health, metrics and the state of the role.
	// Without it such a listener must be on loopback. It excludes Control. Default off.
	Open bool `yaml:"open"`
	// PProf, of an admin listener with Control, serves /debug/pprof/ to the same clients. Default off.
	PProf bool `yaml:"pprof"`
	// Bind opens the listener, nil is the operating system's. Set by tests.
	Bind func(ctx context.Context, network, addr string) (net.Listener, error) `yaml:"-"`
}

// Server is one bound listener.
type Server struct {
	name  string
	cfg   ServerConfig
	l     net.Listener
	srv   *http.Server
	log   *slog.Logger
	plain bool

	settled sync.Map // net.Conn: avoidBBR has nothing more to do
	warned  sync.Once
}

// NewServer binds the listener at once. A taken port is reported with who has it, where that can be known.
func NewServer(name string, cfg ServerConfig, h http.Handler, log *slog.Logger) (*Server, error) {
	if cfg.DrainTimeout == 0 {
		cfg.DrainTimeout = config.Duration(30 * time.Second)
	}
	switch {
	case name == "admin":
		h = OwnHosts(cfg)(h)
	case cfg.Control || cfg.PProf:
		return nil, fmt.Errorf("%s listener: control and pprof belong to admin", name)
	}
	if cfg.PProf && !cfg.Control {
		return nil, fmt.Errorf("%s listener: pprof needs control", name)
	}
	tc, d, err := cfg.TLS.server(log)
	if err != nil {
		return nil, fmt.Errorf("%s listener: %w", name, err)
	}
	bind := cfg.Bind
	if bind == nil {
		lc := listenConfig(cfg.CongestionControl)
		bind = lc.Listen
	}
	l, err := bind(context.Background(), "tcp", cfg.Listen)
	if err != nil {
		if who := PortOwner(cfg.Listen); who != "" {
			err = fmt.Errorf("%w: %s has it", err, who)
		}
		return nil, fmt.Errorf("%s listener: %w", name, err)
	}
	if name != "admin" {
		own := NewDescriptors()
		l, h = thrifty{l, own}, own.refuseScarce(h)
	}
	s := &Server{name: name, cfg: cfg, l: l, log: log, plain: tc == nil}
	if tc != nil {
		s.l = tls.NewListener(l, tc)
	}
	s.srv = &http.Server{
		Handler:           refuseDenied(h, d),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		BaseContext: func(net.Listener) context.Context {
			return context.WithValue(context.Background(), leastRate{}, cfg.LeastRate)
		},
		ConnContext: withConn,
		ConnState:   newCrowd().connState,
		ErrorLog:    slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	if cfg.CongestionControl == CongestionAuto {
		crowd := s.srv.ConnState
		s.srv.ConnState = func(c net.Conn, state http.ConnState) {
			crowd(c, state)
			s.avoidBBR(c, state)
		}
	}
	return s, nil
}

// refuseDenied ends connections whose certificate came on the list after they were made.
func refuseDenied(h http.Handler, d *denied) http.Handler {
	if d == nil {
		return h
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS != nil && d.check(*r.TLS) != nil {
			panic(http.ErrAbortHandler)
		}
		h.ServeHTTP(w, r)
	})
}

// avoidBBR is http.Server's ConnState for CongestionAuto. It looks again at each request until it is done: the
// handshake may have waited in a queue, so that a short path seems long.
func (s *Server) avoidBBR(c net.Conn, state http.ConnState) {
	switch state {
	case http.StateActive:
		if _, done := s.settled.Load(c); done {
			return
		}
		done, err := avoidBBR(c)
		if done {
			s.settled.Store(c, struct{}{})
		}
		if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.ENOENT) {
			s.warned.Do(func() {
				s.log.Warn("connections stay with BBR, which gets little of a link beside many peers: cubic has to be in net.ipv4.tcp_allowed_congestion_control of the host",
					"listener", s.name, "allowed", sysctl("tcp_allowed_congestion_control"), "available", sysctl("tcp_available_congestion_control"), "error", err)
			})
		}
	case http.StateClosed, http.StateHijacked:
		s.settled.Delete(c)
	}
}

// Addr is the bound host:port.
func (s *Server) Addr() string { return s.l.Addr().String() }

// URL is where others reach the server.
func (s *Server) URL() string {
	host := s.cfg.Advertise
	if host == "" {
		host = s.Addr()
	}
	if a, err := netip.ParseAddr(host); err == nil { // without a port it is the listener's
		host = netip.AddrPortFrom(a, netip.MustParseAddrPort(s.Addr()).Port()).String()
	}
	if s.plain {
		return "http://" + host
	}
	return "https://" + host
}

// Run serves until ctx is done, then drains within DrainTimeout and cuts off what is left.
func (s *Server) Run(ctx context.Context) error {
	failed := make(chan error, 1)
	go func() { failed <- s.srv.Serve(s.l) }()
	s.log.Info("listening", "listener", s.name, "addr", s.Addr())
	select {
	case err := <-failed:
		return fmt.Errorf("%s listener: %w", s.name, err)
	case <-ctx.Done():
	}
	dctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Duration(s.cfg.DrainTimeout))
	defer cancel()
	err := s.srv.Shutdown(dctx)
	if errors.Is(err, context.DeadlineExceeded) {
		s.log.Warn("requests were cut off at the end of draining", "listener", s.name, "after", s.cfg.DrainTimeout)
		err = s.srv.Close()
	}
	<-failed
	return err
}

// Abort ends the server at once: its listener, and every connection.
func (s *Server) Abort() error { return errors.Join(s.l.Close(), s.srv.Close()) }

// Close ends a server that was never run.
func (s *Server) Close() error { return s.l.Close() }
