package role

import (
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"slices"

	"kraken/proto/config"
	"kraken/proto/ring"
	"kraken/proto/transport"
)

// Config is what every role is configured with; each role's own Config embeds it.
type Config struct {
	// Server is the role's main listener, which the others, or clients, speak to.
	Server transport.ServerConfig `yaml:"server"`
	// Admin is where health, metrics and control are; keep it away from clients. Without listen there is none.
	Admin transport.ServerConfig `yaml:"admin"`
	Log   LogConfig              `yaml:"log"`
	// Cluster is the name that certificates have in their identities, kraken://<cluster>/<role>/<id>. With it every
	// certificate must have one; without it one that has is of the cluster of this role's own certificate.
	Cluster string `yaml:"cluster"`
	// CertificateRoles is, for the time until all certificates have identities, of which role one without is: its
	// common name or DNS names, by role, default the role's own name; a name with a number after it, proxy-01, is meant
	// too. Where none fits it is an agent, which may least.
	CertificateRoles map[transport.Role][]string `yaml:"certificate_roles"`
	// Client is how this role speaks to the others.
	Client transport.ClientConfig `yaml:"client"`
	// Origins are all origins of the cluster. Ids decide who owns what: never rename one.
	Origins []ring.Member `yaml:"origins"`
	// Replicas is the number of origins that hold a blob, default 2, or 1 where there is one origin, at most 5; the
	// same in every role.
	Replicas int `yaml:"replicas" config:"positive"`

	// Role is what this process is. Set by the role.
	Role transport.Role      `yaml:"-"`
	self transport.Principal // whom this role's own certificates name, zero for nobody
}

// Endpoint is a role that is reached by URL.
type Endpoint struct {
	URL string `yaml:"url"`
}

// Validate puts what is wrong into m, under key.
func (e Endpoint) Validate(m *config.Mistakes, key string) { m.URL(key+".url", e.URL) }

// Listener is an address that a role binds, and the key that says so.
type Listener struct{ Key, Addr string }

// MaxReplicas bounds the origins that hold a blob: an upload's id names each.
const MaxReplicas = 5

const defaultReplicas = 2

// Validate fills in defaults and puts what is wrong into m. more are the listeners that the role binds beside server
// and admin; they were validated by the role.
func (c *Config) Validate(m *config.Mistakes, more ...Listener) {
	c.Server.Validate(m, "server")
	if c.Server.Control || c.Server.PProf || c.Server.Open {
		m.Add("server", "control, pprof and open belong to admin")
	}
	if c.Admin.PProf && !c.Admin.Control {
		m.Add("admin.pprof", "needs control")
	}
	listeners := append([]Listener{{"server.listen", c.Server.Listen}}, more...)
	if !reflect.ValueOf(c.Admin).IsZero() {
		c.Admin.Validate(m, "admin")
		c.validateAdmin(m)
		listeners = append(listeners, Listener{"admin.listen", c.Admin.Listen})
	}
	for i, l := range listeners {
		for _, earlier := range listeners[:i] {
			if overlap(l.Addr, earlier.Addr) {
				m.Add(l.Key, "%s can't be bound beside %s, which is %s: give each its own port", l.Addr, earlier.Key, earlier.Addr)
			}
		}
	}
	c.Log.validate(m, "log")
	c.Client.Validate(m, "client")
	c.validateIdentity(m)
	c.validateOrigins(m)
}

// validateAdmin refuses an admin listener that whoever is on the network could ask, where the configuration does not
// say that this is meant.
func (c *Config) validateAdmin(m *config.Mistakes) {
	host, _, err := net.SplitHostPort(c.Admin.Listen)
	a, aerr := netip.ParseAddr(host)
	loopback := host == "localhost" || aerr == nil && a.Unmap().IsLoopback()
	switch {
	case c.Admin.Open && c.Admin.TLS.ClientCA != "":
		m.Add("admin.open", "and tls.client_ca exclude each other: set one")
	case c.Admin.Open && c.Admin.Control:
		m.Add("admin.open", "and control exclude each other: what changes the process is for clients on this machine, or with a certificate")
	case err == nil && !loopback && !c.Admin.Open && c.Admin.TLS.ClientCA == "":
		m.Add("admin.listen", "%s is no loopback address: give tls with client_ca, or set open for a network where everybody may read metrics and state", c.Admin.Listen)
	}
}

// overlap reports whether two listeners can't be bound at once: their ports are equal, and their hosts, or one of these
// is all.
func overlap(a, b string) bool {
	hostA, portA, errA := net.SplitHostPort(a)
	hostB, portB, errB := net.SplitHostPort(b)
	if errA != nil || errB != nil || portA != portB || portA == "0" {
		return false
	}
	return hostA == hostB || Wildcard(hostA) || Wildcard(hostB)
}

// Wildcard reports whether a listener's host stands for all addresses of the machine.
func Wildcard(host string) bool {
	a, err := netip.ParseAddr(host)
	return host == "" || err == nil && a.IsUnspecified()
}

func (c *Config) validateOrigins(m *config.Mistakes) {
	if len(c.Origins) == 0 {
		m.Add("origins", "at least one is needed: the same list, with id and url of each, as in every other role")
	}
	first := map[string]int{}
	for i, o := range c.Origins {
		key := fmt.Sprintf("origins[%d]", i)
		m.Need(key+".id", o.ID)
		if j, twice := first[o.ID]; twice && o.ID != "" {
			m.Add(key+".id", "%q is there twice: origins[%d] has it, too; each origin needs its own", o.ID, j)
		} else {
			first[o.ID] = i
		}
		m.URL(key+".url", o.URL)
		if j := slices.IndexFunc(c.Origins[:i], func(p ring.Member) bool { return o.URL != "" && p.URL == o.URL }); j >= 0 {
			m.Add(key+".url", "%s is there twice: origins[%d] has it, too; both copies of a blob would be at one origin", o.URL, j)
		}
		if o.Peer != "" {
			m.HostPort(key+".peer", o.Peer)
		}
	}
	switch n := len(c.Origins); {
	case c.Replicas == 0:
		c.Replicas = max(1, min(defaultReplicas, n))
	case c.Replicas < 0 || c.Replicas > MaxReplicas:
		m.Add("replicas", "%d is not in 1..%d", c.Replicas, MaxReplicas)
	case n > 0 && c.Replicas > n:
		m.Add("replicas", "%d copies of a blob need as many origins, and origins has %d", c.Replicas, n)
	}
}

func (c *Config) Shared() *Config { return c }

// settings is a pointer to the configuration of a role: a struct that embeds Config.
type settings[C any] interface {
	*C
	Shared() *Config
	Validate() error
}
