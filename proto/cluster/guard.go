package cluster

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"kraken/proto/registry"
	"kraken/proto/transport"
)

// Identities says whose certificates are believed, beyond that an authority of the configuration vouches for them.
type Identities struct {
	// Cluster is the name that identities must have; empty: any.
	Cluster string
	// Required refuses certificates without an identity. Without it they are of the role in Names that one of their
	// names fits, and else of an agent, which may least.
	Required bool
	// Names are common and DNS names of certificates without an identity, by role: the name itself, or with a dash and
	// a number after it.
	Names map[transport.Role][]string
}

// Of returns whom a verified certificate names, ErrDenied with the reason where that is nobody of this cluster.
func (i Identities) Of(c *x509.Certificate) (transport.Principal, error) {
	p, err := transport.PrincipalOf(c)
	switch {
	case err == nil && i.Cluster != "" && p.Cluster != i.Cluster:
		return p, fmt.Errorf("%w: %s is of another cluster than %s", registry.ErrDenied, p, i.Cluster)
	case err == nil && !slices.Contains(transport.Roles, p.Role):
		return p, fmt.Errorf("%w: %s has a role that this version does not know", registry.ErrDenied, p)
	case err == nil:
		return p, nil
	case len(identitiesIn(c)) > 0 || i.Required:
		return p, fmt.Errorf("%w: %w", registry.ErrDenied, err)
	}
	return transport.Principal{Role: i.roleOf(c)}, nil
}

// identitiesIn returns the alternative names that are meant to be identities.
func identitiesIn(c *x509.Certificate) (out []string) {
	for _, u := range c.URIs {
		if strings.EqualFold(u.Scheme, "kraken") {
			out = append(out, u.String())
		}
	}
	return out
}

// roleOf is the role of a certificate without an identity.
func (i Identities) roleOf(c *x509.Certificate) transport.Role {
	shown := append([]string{c.Subject.CommonName}, c.DNSNames...)
	for _, role := range transport.Roles {
		for _, name := range i.Names[role] {
			if slices.ContainsFunc(shown, func(s string) bool { return fits(s, name) }) {
				return role
			}
		}
	}
	return transport.RoleAgent
}

// fits reports whether a certificate's name is the one that was configured, or that with a dash and a number.
func fits(shown, name string) bool {
	rest, ok := strings.CutPrefix(shown, name)
	number, dash := strings.CutPrefix(rest, "-")
	return ok && name != "" && (rest == "" || dash && number != "" && strings.Trim(number, "0123456789") == "")
}

// Guard lets requests to a listener with mutual TLS through whose certificates may make them, by Rights, and answers
// others 403. It is the one place where that is decided.
type Guard struct {
	At         string // as in Right
	Identities Identities
	// Refused is told of each request that the caller may not make; it may be nil.
	Refused func(r *http.Request, p transport.Principal, err error)
}

// Middleware returns h behind the guard.
func (g Guard) Middleware(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, err := g.check(r)
		if err == nil {
			h.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, p)))
			return
		}
		if g.Refused != nil && errors.Is(err, registry.ErrDenied) {
			g.Refused(r, p, err)
		}
		registry.WriteError(w, r, err)
	})
}

// forPeople reports whether the listener is one whose clients need not be nodes.
func (g Guard) forPeople() bool {
	return g.At == string(transport.RoleProxy) || g.At == string(transport.RoleAgent)
}

func (g Guard) check(r *http.Request) (transport.Principal, error) {
	c := transport.ClientCertificate(r)
	if c == nil {
		if g.forPeople() { // the listener asks for certificates and takes clients without
			return transport.Principal{}, nil
		}
		return transport.Principal{}, fmt.Errorf("%w: a certificate of the cluster is needed", registry.ErrDenied)
	}
	ids := g.Identities
	if g.forPeople() && len(identitiesIn(c)) == 0 {
		return transport.Principal{Role: transport.RoleClient, ID: c.Subject.CommonName}, nil
	}
	p, err := ids.Of(c)
	if err != nil {
		return p, err
	}
	switch judge(g.At, r.Method, r.URL.Path, p.Role) {
	case allowed:
		return p, nil
	case denied:
		return p, fmt.Errorf("%w: a certificate of the role %s may not %s %.200q at %s", registry.ErrDenied, p.Role, r.Method, r.URL.Path, g.At)
	case noMethod:
		return p, fmt.Errorf("%w: %.20q here", registry.ErrUnsupported, r.Method)
	}
	return p, fmt.Errorf("%w: no such path %.200q", errNoPath, r.URL.Path)
}

var errNoPath = &registry.Error{Code: "NOT_FOUND", Status: http.StatusNotFound, Message: "not found"}

type callerKey struct{}

// Caller returns whose certificate a request came with, as the Guard of its listener found. ok is false where the
// listener has none, or asks for no certificates: then nobody is known. A certificate without an identity has a role
// alone.
func Caller(ctx context.Context) (p transport.Principal, ok bool) {
	p, ok = ctx.Value(callerKey{}).(transport.Principal)
	return p, ok && p != (transport.Principal{})
}

// MayBe reports whether a request may be one of a role: its certificate says so, or the listener asks for none.
func MayBe(r *http.Request, role transport.Role) bool {
	p, ok := Caller(r.Context())
	return !ok || p.Role == role
}
