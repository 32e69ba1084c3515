package upstream

import (
	"cmp"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/publicsuffix"

	"kraken/proto/cluster"
	"kraken/proto/config"
)

// Config is the section `upstreams`, the same in build-index' and all origins' configuration.
type Config struct {
	// Registries are in order: the first whose pattern matches a registry decides. Default none: nothing is mirrored.
	Registries []RegistryConfig `yaml:"registries"`
	// Deny are patterns of registries that are never mirrored, for an entry with `*`.
	Deny []string `yaml:"deny"`
	// Offline asks no upstream and resolves no upstream's name: what the cluster has is served, and nothing else.
	Offline bool `yaml:"offline"`
	// AllowAddresses are networks (10.1.0.0/16, 127.0.0.1/32) that upstreams may be at although they are loopback,
	// link-local or of a cloud's metadata service, or private where another host leads there. Whoever may name an
	// upstream makes this machine send requests there. The literal address of a configured endpoint needs no entry.
	AllowAddresses []string `yaml:"allow_addresses"`
	// NamesCapacity bounds what build-index keeps of upstreams, default 1GiB: the bytes of manifests and of lists of
	// referrers, and 256 for each list and each proof that a repository has a blob. What was used least recently goes.
	NamesCapacity config.Size `yaml:"names_capacity" config:"positive"`
	// GrantTTL is how long an upstream's yes to a caller's credential counts (mode caller), default 5m.
	GrantTTL config.Duration `yaml:"grant_ttl"`

	allow []netip.Prefix
}

// RegistryConfig is one registry that the cluster mirrors, or several of one pattern.
type RegistryConfig struct {
	// Registry is a host, or a pattern in which `*` stands for any characters; with :port where it has one.
	Registry string `yaml:"registry"`
	// Endpoints are where the registry is asked, in order: the next one when one does not have it or does not answer.
	// Default https at its own host. Not with a pattern.
	Endpoints []Endpoint `yaml:"endpoints"`
	// Access is how the registry's own host is reached where no endpoints are named.
	Access `yaml:",inline"`
	// Modes say by repository who may read it through the cluster; the first whose pattern matches decides. Default
	// public.
	Modes []cluster.RepositoryMode `yaml:"modes"`
	// Import allows pushes to the registry's names, for machines without a way to it.
	Import bool `yaml:"import"`
	// WriteBack writes names and blobs to the bucket, as those of the cluster's own. Default no: they are a cache.
	WriteBack bool `yaml:"write_back"`
	// Offline is Config.Offline for this entry. With import, its names are pushed and never asked for elsewhere.
	Offline bool `yaml:"offline"`
	// Relay passes blobs on without keeping them; RelayAbove does so with those of more bytes, default none.
	Relay      bool        `yaml:"relay"`
	RelayAbove config.Size `yaml:"relay_above"`
	// TagTTL is how long a tag counts after the upstream said what it is, default 1m. One request then, for all who
	// ask.
	TagTTL config.Duration `yaml:"tag_ttl"`
	// NegativeTTL is how long "not there" and "not allowed" count, default 10s.
	NegativeTTL config.Duration `yaml:"negative_ttl"`
	// StaleFor bounds the age of an answer that is given while the upstream can't be asked, default 720h.
	StaleFor config.Duration `yaml:"stale_for"`
	// Patience is how long a name is waited for before what was known last is served, default 800ms; where nothing is
	// known it is 20s.
	Patience config.Duration `yaml:"patience"`
	// Concurrency bounds the blobs, and as many names, that are read from one registry at once, default 16.
	Concurrency int `yaml:"concurrency"`
	// Rate bounds the bytes of blobs that come from one registry, e.g. 200Mbit/s; default 0, unlimited.
	Rate config.Rate `yaml:"rate"`
}

// Access is how a host is reached.
type Access struct {
	// CA is a PEM file of trusted roots, default the system's.
	CA string `yaml:"ca"`
	// PlainHTTP allows HTTP without TLS, also with passwords. Default no.
	PlainHTTP bool `yaml:"plain_http"`
	// Credentials are what this cluster presents for repositories of mode node; default none. What they may read is
	// read by whoever reaches an agent.
	Credentials Credentials `yaml:"credentials"`
}

// Endpoint is one place where a registry is asked.
type Endpoint struct {
	// URL is https://host[:port], with a path where the place has the registry's repositories below one.
	URL    string `yaml:"url"`
	Access `yaml:",inline"`
}

// Credentials say who the cluster is to an upstream: one of four ways, or none.
type Credentials struct {
	// Username and Password, which may be file: and a path. Username <token> says that Password is an identity token.
	// With a pattern only where it ends with a domain that one owner has (*.corp.example, not *.co.uk): else it would
	// go to any host that somebody names.
	Username string        `yaml:"username"`
	Password config.Secret `yaml:"password"`
	// DockerConfig is the path of a docker config.json with auths, credsStore or credHelpers, read at each login.
	DockerConfig string `yaml:"docker_config"`
	// Helper is a credential helper: the program docker-credential-<helper>, in PATH.
	Helper string `yaml:"helper"`
	// Keychain is a cloud's identity of this machine: google (gcr.io, pkg.dev).
	Keychain string `yaml:"keychain"`
}

// none reports whether there are no credentials.
func (c Credentials) none() bool { return c == Credentials{} }

// Defaults of a RegistryConfig.
const (
	defaultTagTTL      = time.Minute
	defaultNegativeTTL = 10 * time.Second
	defaultStaleFor    = 30 * 24 * time.Hour
	defaultPatience    = 800 * time.Millisecond
	defaultGrantTTL    = 5 * time.Minute
	defaultConcurrency = 16
	defaultNames       = 1 << 30
)

// Validate fills in defaults and refuses what can't work.
func (c *Config) Validate() error {
	var m config.Mistakes
	c.NamesCapacity = cmp.Or(c.NamesCapacity, defaultNames)
	c.GrantTTL = cmp.Or(c.GrantTTL, config.Duration(defaultGrantTTL))
	for i := range c.Registries {
		c.Registries[i].validate(&m, fmt.Sprintf("registries[%d]", i))
	}
	for i, p := range c.Deny {
		m.Need(fmt.Sprintf("deny[%d]", i), p)
	}
	c.allow = nil
	for i, text := range c.AllowAddresses {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			m.Add(fmt.Sprintf("allow_addresses[%d]", i), "%q: want a network such as 10.1.0.0/16 or 127.0.0.1/32", text)
			continue
		}
		c.allow = append(c.allow, p)
	}
	return m.Err()
}

func (r *RegistryConfig) validate(m *config.Mistakes, key string) {
	m.Need(key+".registry", r.Registry)
	if strings.ContainsAny(r.Registry, "/ ") {
		m.Add(key+".registry", "%q: want a host, or a pattern of one, and no scheme or path", r.Registry)
	}
	r.TagTTL = cmp.Or(r.TagTTL, config.Duration(defaultTagTTL))
	r.NegativeTTL = cmp.Or(r.NegativeTTL, config.Duration(defaultNegativeTTL))
	r.StaleFor = cmp.Or(r.StaleFor, config.Duration(defaultStaleFor))
	r.Patience = cmp.Or(r.Patience, config.Duration(defaultPatience))
	r.Concurrency = cmp.Or(r.Concurrency, defaultConcurrency)
	config.NotNegative(m, key+".concurrency", r.Concurrency)
	config.NotNegative(m, key+".relay_above", r.RelayAbove)
	r.Access.validate(m, key)
	if len(r.Endpoints) > 0 && strings.Contains(r.Registry, "*") {
		m.Add(key+".endpoints", "are of one registry, and %q may be several", r.Registry)
	}
	for i := range r.Endpoints {
		r.Endpoints[i].validate(m, fmt.Sprintf("%s.endpoints[%d]", key, i))
	}
	if r.Credentials.Username != "" && !ofDomain(r.Registry) {
		m.Add(key+".credentials", "are a user and a password, which would go to any host that somebody names as %q: want a host, a pattern that ends with a domain (*.corp.example), or docker_config or helper, which know whose a password is", r.Registry)
	}
	if r.presents() && !slices.ContainsFunc(r.Modes, func(m cluster.RepositoryMode) bool { return m.Mode == cluster.ModeNode }) {
		m.Add(key+".credentials", "are presented for repositories of mode node alone, because whoever reaches an agent reads what they may read: say which, in modes")
	}
	modes := []cluster.Mode{cluster.ModePublic, cluster.ModeNode, cluster.ModeCaller}
	for i, mode := range r.Modes {
		at := fmt.Sprintf("%s.modes[%d]", key, i)
		m.Need(at+".repository", mode.Repository)
		if !slices.Contains(modes, mode.Mode) {
			m.Add(at+".mode", "%q: want public, node or caller", mode.Mode)
		}
	}
}

// ofDomain reports whether a registry, or all that a pattern matches, is of one domain, which somebody has: below co.uk
// and herokuapp.com anybody gets a name.
func ofDomain(pattern string) bool {
	at := strings.LastIndex(pattern, "*")
	if at < 0 {
		return true
	}
	host, _, _ := strings.Cut(pattern[at+1:], ":")
	domain, ok := strings.CutPrefix(strings.ToLower(host), ".")
	if !ok || !strings.Contains(domain, ".") {
		return false
	}
	for _, name := range []string{domain, "any." + domain} {
		if suffix, _ := publicsuffix.PublicSuffix(name); suffix == name {
			return false
		}
	}
	return true
}

// presents reports whether there are credentials.
func (r *RegistryConfig) presents() bool {
	return !r.Credentials.none() || slices.ContainsFunc(r.Endpoints, func(e Endpoint) bool { return !e.Credentials.none() })
}

func (a *Access) validate(m *config.Mistakes, key string) {
	if a.CA != "" {
		m.File(key+".ca", a.CA)
	}
	c, key := a.Credentials, key+".credentials"
	ways := 0
	for _, set := range []bool{c.Username != "" || c.Password.Value() != "", c.DockerConfig != "", c.Helper != "", c.Keychain != ""} {
		if set {
			ways++
		}
	}
	if ways > 1 {
		m.Add(key, "are given in %d ways: want username and password, docker_config, helper or keychain", ways)
	}
	if (c.Username == "") != (c.Password.Value() == "") {
		m.Add(key, "want username and password, or neither")
	}
	if c.DockerConfig != "" {
		m.File(key+".docker_config", c.DockerConfig)
	}
	if strings.ContainsAny(c.Helper, "/\\ ") {
		m.Add(key+".helper", "%q: want the name after docker-credential-", c.Helper)
	}
	if c.Keychain != "" && c.Keychain != keychainGoogle {
		m.Add(key+".keychain", "%q: want %s; for others there is helper", c.Keychain, keychainGoogle)
	}
}

func (e *Endpoint) validate(m *config.Mistakes, key string) {
	u, err := url.Parse(e.URL)
	switch {
	case err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "":
		m.Add(key+".url", "%q: want https://host[:port][/path]", e.URL)
	case u.User != nil:
		m.Add(key+".url", "holds a user or password: those are credentials")
	case u.RawQuery != "" || u.Fragment != "":
		m.Add(key+".url", "%q: want https://host[:port][/path] and nothing else", e.URL)
	case u.Scheme == "http" && !e.PlainHTTP:
		m.Add(key+".url", "%q is not encrypted: want https, or plain_http: true beside it", e.URL)
	}
	e.Access.validate(m, key)
}

// Public returns what agents and proxies are told.
func (c *Config) Public() cluster.Upstreams {
	out := cluster.Upstreams{Upstreams: []cluster.Upstream{}, Deny: c.Deny, Offline: c.Offline}
	for _, r := range c.Registries {
		out.Upstreams = append(out.Upstreams, cluster.Upstream{Registry: r.Registry, Import: r.Import, Modes: r.Modes})
	}
	return out
}
