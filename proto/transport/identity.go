package transport

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
)

// Role is what a certificate's holder is in its cluster. One that is not known here may do nothing.
type Role string

// The roles that certificates name.
const (
	RoleProxy      Role = "proxy"
	RoleOrigin     Role = "origin"
	RoleBuildIndex Role = "build-index"
	RoleTracker    Role = "tracker"
	RoleAgent      Role = "agent"
	// RoleOperator is a person, or a tool of one, who may look at admin listeners and change what can be changed there.
	RoleOperator Role = "operator"
	// RoleMonitor may read health and metrics, and nothing else.
	RoleMonitor Role = "monitor"
	// RoleClient is somebody to whom proxies and agents are a registry.
	RoleClient Role = "client"
)

// Roles are all that certificates may name.
var Roles = []Role{RoleProxy, RoleOrigin, RoleBuildIndex, RoleTracker, RoleAgent, RoleOperator, RoleMonitor, RoleClient}

// Principal is whom a certificate names, by its alternative name kraken://<cluster>/<role>/<id>.
type Principal struct {
	Cluster string
	Role    Role
	ID      string // of a node, its name; one of each role in a cluster
}

const identityScheme = "kraken://"

// ErrNoIdentity is a certificate that names no principal.
var ErrNoIdentity = errors.New("the certificate has no alternative name kraken://<cluster>/<role>/<id>")

// principalGrammar is one way of writing each principal: lower case where hosts of URLs have no case, no escapes, no
// port, and nothing that means a path of its own.
var principalGrammar = regexp.MustCompile(`^kraken://([a-z0-9](?:[a-z0-9.-]{0,61}[a-z0-9])?)/([a-z](?:[a-z0-9-]{0,30}[a-z0-9])?)/([A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?)$`)

// ParsePrincipal reads kraken://<cluster>/<role>/<id>: at most 63 characters of a-z, 0-9, dot and dash, 32 of a-z, 0-9
// and dash, and 253 of letters, digits, dot, dash and underscore. The role need not be a known one.
func ParsePrincipal(uri string) (Principal, error) {
	m := principalGrammar.FindStringSubmatch(uri)
	if m == nil {
		return Principal{}, fmt.Errorf("%.300q is no identity: want kraken://<cluster>/<role>/<id>, of letters, digits, dots and dashes, cluster and role in lower case", uri)
	}
	return Principal{Cluster: m[1], Role: Role(m[2]), ID: m[3]}, nil
}

// String returns the principal as certificates name it, nothing for the zero one.
func (p Principal) String() string {
	if p == (Principal{}) {
		return ""
	}
	return identityScheme + p.Cluster + "/" + string(p.Role) + "/" + p.ID
}

// PrincipalOf returns whom a certificate names: ErrNoIdentity where it names nobody, and another error where it names
// two, or one that is not in the grammar.
func PrincipalOf(c *x509.Certificate) (Principal, error) {
	var found []string
	for _, u := range c.URIs {
		if strings.EqualFold(u.Scheme, strings.TrimSuffix(identityScheme, "://")) {
			found = append(found, u.String())
		}
	}
	switch len(found) {
	case 0:
		return Principal{}, ErrNoIdentity
	case 1:
		return ParsePrincipal(found[0])
	}
	return Principal{}, fmt.Errorf("the certificate names %d identities, want one: %.600q", len(found), found)
}

// Identity returns whom the certificate names that a client showed and that was verified. ok is false for a request
// without one, and for a certificate that names nobody, or not one.
func Identity(r *http.Request) (p Principal, ok bool) {
	c := ClientCertificate(r)
	if c == nil {
		return Principal{}, false
	}
	p, err := PrincipalOf(c)
	return p, err == nil
}

// ClientCertificate returns the certificate that a client showed and that was verified, nil where the listener wants
// none.
func ClientCertificate(r *http.Request) *x509.Certificate {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return nil
	}
	return r.TLS.VerifiedChains[0][0]
}

// ClientNames returns the names in the certificate that a client showed and that was verified: the common name and the
// alternative DNS names and URIs. ok is false for a request without one: the listener wants none.
func ClientNames(r *http.Request) (names []string, ok bool) {
	c := ClientCertificate(r)
	if c == nil {
		return nil, false
	}
	if c.Subject.CommonName != "" {
		names = append(names, c.Subject.CommonName)
	}
	names = append(names, c.DNSNames...)
	for _, u := range c.URIs {
		names = append(names, u.String())
	}
	return names, true
}
