// Package upstream reads registries outside the cluster: which of them are mirrored, where they are asked, who the
// cluster is to them, and that a request goes only to addresses that an upstream may be at. Build-index reads names
// with it, origins blobs.
//
// The package keeps nothing that it reads.
package upstream

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/cluster"
	"kraken/proto/config"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// Set are the registries that a configuration names. It is safe for concurrent use.
type Set struct {
	cfg    Config
	public cluster.Upstreams
	log    *slog.Logger
	m      *metrics
	guard  *guard
	tokens tokens
	key    []byte // of Credential.digest, for this process

	configured map[string]*Registry // by host; they are never forgotten

	named *lru.Cache[string, *Registry] // by host, of patterns: whoever may name registries has them remembered
	mu    sync.Mutex                    // of who enters one there
}

// maxRegistries bounds the registries of patterns that a Set remembers: those that were used least recently go.
const maxRegistries = 1024

// Options are what a Set has beside its configuration.
type Options struct {
	Log     *slog.Logger          // nil for none
	Metrics prometheus.Registerer // nil for none
}

// Open returns the registries of a configuration that was validated. It resolves no name and sends no request.
func Open(cfg Config, o Options) (*Set, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Set{cfg: cfg, public: cfg.Public(), log: o.Log, m: newMetrics(o.Metrics), guard: newGuard(cfg.allow), key: make([]byte, 32), configured: map[string]*Registry{}}
	rand.Read(s.key) // never fails
	var err error
	if s.named, err = lru.NewWithEvict(maxRegistries, func(_ string, r *Registry) { s.forget(r) }); err != nil {
		return nil, err
	}
	for _, r := range cfg.Registries {
		host := cluster.CanonicalRegistry(r.Registry)
		if strings.Contains(r.Registry, "*") || s.configured[host] != nil {
			continue
		}
		if s.configured[host], err = s.make(host); err != nil {
			return nil, fmt.Errorf("upstream %s: %w", r.Registry, err)
		}
	}
	return s, nil
}

// Close ends idle connections. Bodies that are open stay so.
func (s *Set) Close() {
	for _, r := range s.all() {
		s.forget(r)
	}
}

// forget ends what a registry keeps that is not used any more.
func (s *Set) forget(r *Registry) {
	for _, p := range r.places {
		p.login.hc.CloseIdleConnections()
	}
}

// all returns the registries that are known, the configured ones first.
func (s *Set) all() []*Registry {
	hosts := slices.Sorted(maps.Keys(s.configured))
	out := make([]*Registry, 0, len(hosts))
	for _, host := range hosts {
		out = append(out, s.configured[host])
	}
	return append(out, s.named.Values()...)
}

// Check returns nil while all registries answer that were asked; the error names those that did not, or refuse more.
func (s *Set) Check(context.Context) error {
	var silent []string
	for _, r := range s.all() {
		for _, p := range r.places {
			if what := p.trouble(); what != "" {
				silent = append(silent, r.Host+" "+what)
				break
			}
		}
	}
	if len(silent) > 0 {
		return fmt.Errorf("%w: %s", registry.ErrUnavailable, strings.Join(silent[:min(len(silent), 10)], ", "))
	}
	return nil
}

// Public returns what agents and proxies are told.
func (s *Set) Public() cluster.Upstreams { return s.public }

// WritesBack reports whether names and blobs of any upstream go to the bucket.
func (s *Set) WritesBack() bool {
	return slices.ContainsFunc(s.cfg.Registries, func(r RegistryConfig) bool { return r.WriteBack })
}

// Offline reports whether no upstream may be asked.
func (s *Set) Offline() bool { return s.cfg.Offline }

// For returns the registry of a repository, as it is called inside the cluster, and the repository's name there. ok is
// false for the cluster's own and for what is not mirrored. The cluster's credentials are presented for repositories of
// mode node; others are read as nobody, and those of mode caller as Registry.As says.
func (s *Set) For(repository string) (r *Registry, remote string, ok bool) {
	host, rest, ok := cluster.SplitUpstream(repository)
	if !ok || !s.public.Mirrors(host) {
		return nil, "", false
	}
	r, err := s.registry(host)
	if err != nil {
		s.log.Warn("an upstream can't be asked", "registry", host, "error", err)
		return nil, "", false
	}
	if s.modeOf(host, rest) != cluster.ModeNode {
		nobody := *r
		nobody.as = &Credential{}
		r = &nobody
	}
	return r, rest, true
}

// ForRequest is For, and in mode caller the registry as it is asked with what the request's context carries
// (cluster.WithAuthorization); as nobody, whom the upstream refuses, where that is nothing or can't be sent.
func (s *Set) ForRequest(ctx context.Context, repository string) (r *Registry, remote string, ok bool) {
	r, remote, ok = s.For(repository)
	if !ok || s.modeOf(r.Host, remote) != cluster.ModeCaller {
		return r, remote, ok
	}
	if c, presented := BasicCredential(cluster.Authorization(ctx)); presented {
		as, err := r.As(c)
		if err != nil {
			s.log.Warn("a caller's credential can't be sent", "registry", r.Host, "error", err)
			return r, remote, ok
		}
		r = as
	}
	return r, remote, ok
}

// modeOf returns who may read a repository of a registry.
func (s *Set) modeOf(host, remote string) cluster.Mode {
	entry, _ := s.public.Match(host)
	return entry.Mode(remote)
}

// registry returns the one at a host, and makes it at the first use.
func (s *Set) registry(host string) (*Registry, error) {
	if r := s.configured[host]; r != nil {
		return r, nil
	}
	if r, ok := s.named.Get(host); ok {
		return r, nil
	}
	r, err := s.make(host) // reads files, so nothing is held
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if first, ok := s.named.Get(host); ok { // made meanwhile
		return first, nil
	}
	s.named.Add(host, r)
	return r, nil
}

// make makes the registry at a host, as the first entry says that matches.
func (s *Set) make(host string) (*Registry, error) {
	i := slices.IndexFunc(s.cfg.Registries, func(c RegistryConfig) bool {
		return cluster.MatchGlob(cluster.CanonicalRegistry(c.Registry), host)
	})
	if i < 0 {
		return nil, fmt.Errorf("%w: registry %s is not mirrored", registry.ErrNameUnknown, host)
	}
	return s.open(host, s.cfg.Registries[i])
}

// open makes the registry at a host.
func (s *Set) open(host string, cfg RegistryConfig) (*Registry, error) {
	r := &Registry{Host: host, RegistryConfig: cfg, set: s, blobs: newSlots(cfg.Concurrency), names: newSlots(cfg.Concurrency), limit: newLimit(cfg.Rate), doubts: &doubts{}}
	endpoints := cfg.Endpoints
	if len(endpoints) == 0 {
		endpoints = []Endpoint{{URL: ownURL(host, cfg.PlainHTTP), Access: cfg.Access}}
	}
	for _, e := range endpoints {
		p, err := s.place(host, cfg.Registry, e)
		if err != nil {
			return nil, err
		}
		r.places = append(r.places, p)
	}
	return r, nil
}

// ownURL returns where a registry is asked that has no endpoints.
func ownURL(host string, plain bool) string {
	switch {
	case host == "docker.io":
		return "https://registry-1.docker.io"
	case plain:
		return "http://" + host
	}
	return "https://" + host
}

// progressTimeout is how long an upstream may stand still.
const progressTimeout = 30 * time.Second

// dialTimeout bounds the making of a connection to an upstream.
const dialTimeout = 5 * time.Second

// place makes the client of one endpoint of the registry at host, which pattern stands for in metrics.
func (s *Set) place(host, pattern string, e Endpoint) (*place, error) {
	u, err := url.Parse(e.URL)
	if err != nil {
		return nil, err
	}
	if !strings.Contains(pattern, "*") { // else anybody names it
		s.guard.allowLiteral(u)
	}
	hc, err := transport.NewClient(transport.ClientConfig{
		CA: e.CA, DialTimeout: config.Duration(dialTimeout), ProgressTimeout: config.Duration(progressTimeout), Dial: s.guard.dialer(hostPort(u)).dial, Proxy: s.guard.proxy,
	}, s.log)
	if err != nil {
		return nil, err
	}
	prefix := strings.Trim(u.Path, "/")
	u = &url.URL{Scheme: u.Scheme, Host: u.Host}
	l := &login{next: hc.Transport, hc: hc, host: u, plain: e.PlainHTTP && u.Scheme == "http", source: &source{cfg: e.Credentials, host: host}, tokens: &s.tokens, key: s.key, left: s.m.left.WithLabelValues(pattern)}
	p := &place{url: u, prefix: prefix, login: l}
	p.client, err = registry.NewClientWith(u.String(), &http.Client{Transport: l}, registry.ClientOptions{Elsewhere: maxRedirects})
	return p, err
}

// maxRedirects bounds the redirects of one read.
const maxRedirects = 5
