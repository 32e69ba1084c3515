package cluster

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"kraken/proto/registry"
)

// Mode says who may read an upstream's repository through the cluster.
type Mode string

// Modes of an upstream's repositories.
const (
	// ModePublic is for repositories that the upstream gives to anybody.
	ModePublic Mode = "public"
	// ModeNode is for repositories that are read with the cluster's credentials and given to whoever reaches an agent.
	ModeNode Mode = "node"
	// ModeCaller is for repositories that a runtime reads with credentials of its own, about which the upstream is
	// asked.
	ModeCaller Mode = "caller"
)

// Upstreams is what build-index tells agents and proxies of the registries that the cluster mirrors
// (GET /v2/_kraken/upstreams).
type Upstreams struct {
	// Upstreams are in order: the first whose pattern matches a registry decides.
	Upstreams []Upstream `json:"upstreams"`
	// Deny are patterns of registries that are never mirrored, whatever Upstreams says.
	Deny []string `json:"deny,omitempty"`
	// Offline says that no upstream is asked: what the cluster has is served, and nothing else.
	Offline bool `json:"offline,omitempty"`
}

// Upstream is one registry, or several of one pattern, that the cluster mirrors.
type Upstream struct {
	// Registry is a host, or a pattern in which `*` stands for any characters; a port is spelled :5000.
	Registry string `json:"registry"`
	// Import allows pushes to its names.
	Import bool `json:"import,omitempty"`
	// Modes are by repository, the first whose pattern matches decides. Default public.
	Modes []RepositoryMode `json:"modes,omitempty"`
}

// RepositoryMode is the mode of an upstream's repositories that match a pattern, see MatchGlob.
type RepositoryMode struct {
	Repository string `json:"repository" yaml:"repository"`
	Mode       Mode   `json:"mode" yaml:"mode"`
}

// Mirrors reports whether the cluster mirrors a registry, which is a host with its port where it has one.
func (u Upstreams) Mirrors(registry string) bool {
	_, ok := u.Match(registry)
	return ok
}

// Match returns the upstream that decides about a registry; ok is false where none does, or it is denied.
func (u Upstreams) Match(registry string) (up Upstream, ok bool) {
	registry = CanonicalRegistry(registry)
	matches := func(pattern string) bool { return MatchGlob(CanonicalRegistry(pattern), registry) }
	if registry == "" || slices.ContainsFunc(u.Deny, matches) {
		return Upstream{}, false
	}
	i := slices.IndexFunc(u.Upstreams, func(up Upstream) bool { return matches(up.Registry) })
	if i < 0 {
		return Upstream{}, false
	}
	return u.Upstreams[i], true
}

// Any reports whether the cluster mirrors anything. Where it does, each repository whose name SplitUpstream splits is
// an upstream's, mirrored or not; where it does not, all repositories are the cluster's own.
func (u Upstreams) Any() bool { return len(u.Upstreams) > 0 }

// Private reports whether there are repositories of ModeCaller.
func (u Upstreams) Private() bool {
	return slices.ContainsFunc(u.Upstreams, func(up Upstream) bool {
		return slices.ContainsFunc(up.Modes, func(m RepositoryMode) bool { return m.Mode == ModeCaller })
	})
}

// Mode returns the mode of a repository of the upstream, as it is called there.
func (u Upstream) Mode(repository string) Mode {
	for _, m := range u.Modes {
		if MatchGlob(m.Repository, repository) {
			return m.Mode
		}
	}
	return ModePublic
}

// ModeOf returns the mode of a repository as it is called inside the cluster, ModePublic for one that is no upstream's.
func (u Upstreams) ModeOf(repository string) Mode {
	host, rest, ok := SplitUpstream(repository)
	if !ok {
		return ModePublic
	}
	up, mirrored := u.Match(host)
	if !mirrored {
		return ModePublic
	}
	return up.Mode(rest)
}

// SplitUpstream returns the registry and the repository there of an upstream's repository, such as docker.io and
// library/nginx of docker.io/library/nginx; the registry has its port after a colon. ok is false for names of the
// cluster's own: of one element, or with a first one that has neither a dot nor a port.
func SplitUpstream(repository string) (host, rest string, ok bool) {
	first, rest, found := strings.Cut(repository, "/")
	if !found || first == "" || rest == "" {
		return "", "", false
	}
	host = CanonicalRegistry(first)
	if !strings.ContainsAny(host, ".:") {
		return "", "", false
	}
	return host, rest, true
}

// JoinUpstream returns the name inside the cluster of a registry's repository: a port becomes an alias
// (registry.corp_5000), because a path element has no colon, and a repository of Docker Hub without a slash gets its
// library/. ErrNameInvalid where that is no name, or would be one of the cluster's own.
func JoinUpstream(host, repository string) (string, error) {
	host = CanonicalRegistry(host)
	if host == dockerHub && !strings.Contains(repository, "/") {
		repository = "library/" + repository
	}
	name := strings.Replace(host, ":", "_", 1) + "/" + repository
	if err := registry.CheckName(name); err != nil {
		return "", err
	}
	if back, _, ok := SplitUpstream(name); !ok || back != host {
		return "", fmt.Errorf("%w: %.100q is no host of a registry", registry.ErrNameInvalid, host)
	}
	return name, nil
}

const dockerHub = "docker.io"

// CanonicalRegistry returns the one spelling of a registry's host: lower case, a port after a colon where the alias has
// an underscore, and docker.io for all names of Docker Hub.
func CanonicalRegistry(host string) string {
	host = strings.ToLower(host)
	if at := strings.LastIndexByte(host, '_'); at > 0 && isPort(host[at+1:]) {
		host = host[:at] + ":" + host[at+1:]
	}
	switch host {
	case "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com":
		return dockerHub
	}
	return host
}

// isPort reports whether s is a port of two to five digits, or a star for any.
func isPort(s string) bool {
	return s == "*" || len(s) >= 2 && len(s) <= 5 && strings.Trim(s, "0123456789") == ""
}

// MatchGlob reports whether all of s matches a pattern: `**` stands for any characters, `*` for any but a slash, all
// others for themselves.
func MatchGlob(pattern, s string) bool {
	// last is where to go on when what follows a star did not match: the star then takes one character more.
	type resume struct {
		pattern, s string
		deep       bool
	}
	var last []resume
	for {
		switch {
		case strings.HasPrefix(pattern, "**"):
			pattern = pattern[2:]
			last = []resume{{pattern, s, true}} // what an earlier star might take, this one takes as well
			continue
		case strings.HasPrefix(pattern, "*"):
			pattern = pattern[1:]
			if n := len(last); n > 0 && !last[n-1].deep {
				last = last[:n-1]
			}
			last = append(last, resume{pattern, s, false})
			continue
		case pattern == "" && s == "":
			return true
		case pattern != "" && s != "" && pattern[0] == s[0]:
			pattern, s = pattern[1:], s[1:]
			continue
		}
		for len(last) > 0 {
			r := &last[len(last)-1]
			if r.s != "" && (r.deep || r.s[0] != '/') {
				break
			}
			last = last[:len(last)-1]
		}
		if len(last) == 0 {
			return false
		}
		r := &last[len(last)-1]
		r.s = r.s[1:]
		pattern, s = r.pattern, r.s
	}
}

// Upstreams returns which registries the cluster mirrors. A build-index of an older version mirrors none.
func (c *IndexClient) Upstreams(ctx context.Context) (u Upstreams, err error) {
	_, err = c.CallJSON(ctx, registry.Request{Method: http.MethodGet, To: everywhere("upstreams")}, &u, http.StatusOK)
	return u, err
}
