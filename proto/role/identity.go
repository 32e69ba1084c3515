package role

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"kraken/proto/cluster"
	"kraken/proto/config"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

var clusterGrammar = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)

// validateIdentity puts what is wrong with names of certificates into m, and finds out whose this role's own are.
func (c *Config) validateIdentity(m *config.Mistakes) {
	c.self = transport.Principal{}
	if c.Cluster != "" && !clusterGrammar.MatchString(c.Cluster) {
		m.Add("cluster", "%.80q: want 1 to 63 of a-z, 0-9, dot and dash, which begin and end with a letter or digit", c.Cluster)
	}
	for name, shown := range c.CertificateRoles {
		key := "certificate_roles." + string(name)
		switch {
		case !slices.Contains(transport.Roles, name):
			m.Add(key, "is no role: want one of %v", transport.Roles)
		case c.Cluster != "":
			m.Add(key, "says nothing beside cluster, with which every certificate must have an identity")
		case slices.Contains(shown, ""):
			m.Add(key, "has an empty name, which would fit every certificate")
		}
	}
	c.ownIdentity(m, "client.cert", c.Client.Cert, c.Client.Key, true)
	c.ownIdentity(m, "server.tls.cert", c.Server.TLS.Cert, c.Server.TLS.Key, false)
}

// ValidatePeers puts into m what is wrong with the certificate that a node shows its peers. It comes after Validate.
func (c *Config) ValidatePeers(m *config.Mistakes, key string, t transport.PeerTLS) {
	t.Validate(m, key)
	c.ownIdentity(m, key+".cert", t.Cert, t.Key, true)
}

// ownIdentity looks at a certificate of this role: others will refuse one that names another role, or another cluster,
// or of a node that has another name. Files that can't be read are others' to complain of.
func (c *Config) ownIdentity(m *config.Mistakes, key, cert, keyFile string, shown bool) {
	if cert == "" || keyFile == "" || c.Role == "" {
		return
	}
	pair, err := tls.LoadX509KeyPair(cert, keyFile)
	if err != nil {
		return
	}
	p, err := transport.PrincipalOf(pair.Leaf)
	switch {
	case err != nil && shown && c.Cluster != "":
		m.Add(key, "%s: %w, and cluster wants one", cert, err)
	case err != nil:
	case p.Role != c.Role:
		m.Add(key, "%s is of %s, and this is the role %s: others would refuse it", cert, p, c.Role)
	case c.Cluster != "" && p.Cluster != c.Cluster:
		m.Add(key, "%s is of %s, and the cluster is %s: others would refuse it", cert, p, c.Cluster)
	case c.self != (transport.Principal{}) && p != c.self:
		m.Add(key, "%s is of %s, and another certificate of this configuration is of %s", cert, p, c.self)
	default:
		c.self = p
	}
}

// Identities are whose certificates this role believes.
func (c *Config) Identities() cluster.Identities {
	names := map[transport.Role][]string{}
	for _, r := range transport.Roles {
		if names[r] = c.CertificateRoles[r]; len(names[r]) == 0 {
			names[r] = []string{string(r)}
		}
	}
	return cluster.Identities{Cluster: cmp.Or(c.Cluster, c.self.Cluster), Required: c.Cluster != "", Names: names}
}

// AdmitPeer returns nil for the certificate of a node that may be in the swarm, registry.ErrDenied for another.
func (c *Chassis) AdmitPeer(cert *x509.Certificate) error {
	p, err := c.identities.Of(cert)
	if err == nil && p.Role != transport.RoleAgent && p.Role != transport.RoleOrigin {
		err = fmt.Errorf("%w: %s is no node of the swarm", registry.ErrDenied, p)
	}
	return err
}

// refusals counts and logs requests that certificates do not allow.
type refusals struct {
	total *prometheus.CounterVec
	lines rate.Sometimes // whoever is refused must not fill the log
}

func (c *Chassis) newRefusals() *refusals {
	r := &refusals{lines: rate.Sometimes{First: 10, Interval: 10 * time.Second}}
	r.total = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "kraken_requests_refused_total", Help: "Requests that the certificate's role may not make, by listener and role.",
	}, []string{"listener", "role"})
	c.Registry.MustRegister(r.total)
	return r
}

// guarded returns h behind the rights of certificates, where the listener asks for them.
func (c *Chassis) guarded(at string, cfg transport.ServerConfig, h http.Handler) http.Handler {
	if cfg.TLS.ClientCA == "" {
		return h
	}
	return cluster.Guard{At: at, Identities: c.identities, Refused: func(r *http.Request, p transport.Principal, err error) {
		role := string(p.Role)
		if !slices.Contains(transport.Roles, p.Role) {
			role = "none"
		}
		c.refused.total.WithLabelValues(at, role).Inc()
		c.refused.lines.Do(func() {
			who := p.String()
			if names, ok := transport.ClientNames(r); ok && p.ID == "" {
				who = fmt.Sprintf("%.300q", names)
			}
			c.Log.Warn("a request was refused", "listener", at, "who", who, "from", r.RemoteAddr, "method", r.Method, "path", fmt.Sprintf("%.200q", r.URL.Path), "reason", err)
		})
	}}.Middleware(h)
}
