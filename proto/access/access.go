// Package access decides who may do what with which repository: callers, rules and the tokens that show a caller to
// others. A proxy asks it at the front door, an agent for the repositories that it does not serve to everybody.
//
// The package knows no password: who shows one is found out by the proxy (package proxy/login).
package access

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"kraken/proto/registry"
)

// Caller is who makes a request. The zero value is a caller that has shown nothing.
type Caller struct {
	// Subject is the caller's name, as rules spell it: a user of htpasswd ("ann"), a robot ("robot+ci"), the subject of
	// an OIDC issuer ("<issuer>:<subject>"), a client certificate ("cert:<name>") or a node ("node:<id>").
	Subject string
	// Groups are what an issuer or a certificate says that the caller belongs to, spelled like subjects.
	Groups []string
	// Scopes, unless nil, are all that the token allows which was shown, whatever the rules say beyond it.
	Scopes []Scope
}

// The subjects that stand for many callers.
const (
	// Anonymous is everybody, logged in or not: what needs no login is not refused to those who have one.
	Anonymous = "anonymous"
	// Authenticated is everybody who has shown who they are.
	Authenticated = "authenticated"
)

// What the subjects of robots, certificates and nodes begin with.
const (
	RobotPrefix = "robot+"
	CertPrefix  = "cert:"
	NodePrefix  = "node:"
)

// Known reports whether the caller has shown who it is.
func (c Caller) Known() bool { return c.Subject != "" }

// HasCatalog reports whether the token that was shown is for the catalog.
func (c Caller) HasCatalog() bool { return covers(c.Scopes, "", registry.ActionCatalog) }

func (c Caller) String() string {
	if c.Subject == "" {
		return Anonymous
	}
	return c.Subject
}

// user is what ${user} stands for: the caller's name where it is a plain one. A robot, or the subject of an issuer, is
// never taken for the user whose name it has.
func (c Caller) user() (string, bool) {
	return c.Subject, c.Subject != "" && !strings.ContainsAny(c.Subject, ":+/")
}

// Scope is an entry of a token's access list, as registries write it.
type Scope struct {
	Type    string   `json:"type"` // repository or registry
	Name    string   `json:"name"`
	Actions []string `json:"actions"`
}

// Types of scopes, and the name and action of the one of type registry.
const (
	TypeRepository = "repository"
	TypeRegistry   = "registry"
	nameCatalog    = "catalog"
	anyAction      = "*"
)

// scopeOf returns the scope that action needs, as a challenge names it. Who pushes also reads what is there.
func scopeOf(repository string, action registry.Action) (s Scope, ok bool) {
	switch action {
	case registry.ActionEnter:
		return Scope{}, false
	case registry.ActionCatalog:
		return Scope{TypeRegistry, nameCatalog, []string{anyAction}}, true
	case registry.ActionPush, registry.ActionOverwrite:
		return Scope{TypeRepository, repository, []string{string(registry.ActionPull), string(registry.ActionPush)}}, true
	}
	return Scope{TypeRepository, repository, []string{string(action)}}, true
}

func (s Scope) String() string { return s.Type + ":" + s.Name + ":" + strings.Join(s.Actions, ",") }

// ParseScopes reads the scopes of a token request: each value has any number of them, between spaces. What is none is
// left out, as registries do, and so is what comes after the first MaxScopes.
func ParseScopes(values []string) (out []Scope) {
	for _, one := range strings.Fields(strings.Join(values, " ")) {
		if len(out) == MaxScopes {
			break
		}
		kind, rest, ok := strings.Cut(one, ":")
		at := strings.LastIndexByte(rest, ':')
		if !ok || at < 0 {
			continue
		}
		if kind, _, class := strings.Cut(kind, "("); class { // repository(plugin)
			one = kind
		} else {
			one = kind
		}
		out = append(out, Scope{one, rest[:at], strings.Split(rest[at+1:], ",")})
	}
	return out
}

// MaxScopes bounds the scopes of one token.
const MaxScopes = 100

// covers reports whether scopes allow action. Overwriting is a way to push: no client knows it as a scope.
func covers(scopes []Scope, repository string, action registry.Action) bool {
	kind, name, want := TypeRepository, repository, string(action)
	switch action {
	case registry.ActionEnter:
		return true
	case registry.ActionCatalog:
		kind, name, want = TypeRegistry, nameCatalog, anyAction
	case registry.ActionOverwrite:
		want = string(registry.ActionPush)
	}
	return slices.ContainsFunc(scopes, func(s Scope) bool {
		return s.Type == kind && s.Name == name && (slices.Contains(s.Actions, want) || slices.Contains(s.Actions, anyAction))
	})
}

// Grant returns of the wanted scopes what rules allow the caller, each with at least one action.
func (p *Policy) Grant(c Caller, wanted []Scope) []Scope {
	out := []Scope{}
	for _, s := range wanted {
		var actions []string
		switch s.Type {
		case TypeRegistry:
			if s.Name == nameCatalog && p.Decide(c, "", registry.ActionCatalog).Allowed {
				actions = []string{anyAction}
			}
		case TypeRepository:
			for _, a := range []registry.Action{registry.ActionPull, registry.ActionPush, registry.ActionDelete} {
				asked := slices.Contains(s.Actions, string(a)) || slices.Contains(s.Actions, anyAction)
				if asked && registry.CheckName(s.Name) == nil && p.Decide(c, s.Name, a).Allowed {
					actions = append(actions, string(a))
				}
			}
		}
		if len(actions) > 0 {
			out = append(out, Scope{s.Type, s.Name, actions})
		}
	}
	return out
}

type callerKey struct{}

// WithCaller returns a context that says who makes a request.
func WithCaller(ctx context.Context, c Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, c)
}

// CallerOf returns who makes the request that ctx is of.
func CallerOf(ctx context.Context) Caller {
	c, _ := ctx.Value(callerKey{}).(Caller)
	return c
}

// CheckUser returns an error for a name that a user can't have, because rules or other callers are spelled so.
func CheckUser(name string) error {
	switch {
	case name == "" || len(name) > 255:
		return fmt.Errorf("user %.60q: want 1 to 255 bytes", name)
	case name == Anonymous, name == Authenticated, name == UserOIDC:
		return fmt.Errorf("user %q: the name stands for other callers", name)
	case strings.HasPrefix(name, RobotPrefix):
		return fmt.Errorf("user %q: names of robots begin so", name)
	case strings.ContainsAny(name, ":*\x00\n\r"):
		return fmt.Errorf("user %.60q: no name has a colon, a * or a line break", name)
	}
	return nil
}

// UserOIDC is the user name whose password is an ID token.
const UserOIDC = "oidc"
