package cluster

import (
	"slices"
	"strings"

	"kraken/proto/registry"
	"kraken/proto/transport"
)

// Right says whose certificates may ask for an endpoint, on a cluster with mutual TLS. The table in proto/README.md
// says the same.
type Right struct {
	At      string // a role's main listener, by the role's name, or admin: each role's
	Methods string // divided by spaces; HEAD goes with GET
	Path    string // as pattern writes it; * is everything
	Roles   []transport.Role
}

// Admin is where rights hold at the admin listener of each role.
const Admin = "admin"

const (
	proxy      = transport.RoleProxy
	origin     = transport.RoleOrigin
	buildIndex = transport.RoleBuildIndex
	tracker    = transport.RoleTracker
	agent      = transport.RoleAgent
	operator   = transport.RoleOperator
	monitor    = transport.RoleMonitor
	client     = transport.RoleClient
)

func only(roles ...transport.Role) []transport.Role { return roles }

// everybody are all that hold a certificate of the cluster.
var everybody = transport.Roles

// people are those to whom proxies and agents are a registry.
var people = only(client, operator, monitor)

// Rights is the one table of who may ask for what. What it does not name nobody may ask for.
var Rights = []Right{
	{"origin", "GET", "/health", everybody},
	{"origin", "GET", "/readiness", everybody},
	{"origin", "GET", "/v2/", everybody},
	{"origin", "GET", "/v2/<name>/blobs/<digest>", only(proxy, origin, buildIndex, agent)},
	{"origin", "DELETE", "/v2/<name>/blobs/<digest>", only(operator)},
	{"origin", "POST", "/v2/<name>/blobs/uploads/", only(proxy)},
	{"origin", "GET PATCH PUT DELETE", "/v2/<name>/blobs/uploads/<session>", only(proxy)},
	{"origin", "GET", "/v2/<name>/_kraken/blobs", only(proxy, origin)},
	{"origin", "PUT", "/v2/<name>/_kraken/blobs", only(proxy, origin)},
	{"origin", "GET PUT", "/v2/<name>/_kraken/debt", only(origin)},
	{"origin", "GET", "/v2/<name>/_kraken/metainfo", only(origin, tracker, agent)},
	{"origin", "DELETE", "/v2/<name>/_kraken/metainfo", only(operator)},
	{"origin", "GET", "/v2/<name>/_kraken/arriving", only(origin, agent)},
	{"origin", "POST", "/v2/<name>/_kraken/verify", only(proxy, origin, agent)},
	{"origin", "POST", "/v2/<name>/_kraken/lease", only(agent)},
	{"origin", "POST", "/v2/<name>/_kraken/durable", only(buildIndex)},
	{"origin", "PUT DELETE", "/v2/<name>/_kraken/names", only(buildIndex)},
	{"origin", "GET", "/v2/_kraken/names", only(buildIndex)},
	{"origin", "GET", "/v2/_kraken/pending", only(buildIndex)},
	{"origin", "PUT", "/v2/_kraken/holder", only(buildIndex)},

	{"build-index", "GET", "/health", everybody},
	{"build-index", "GET", "/readiness", everybody},
	{"build-index", "GET", "/v2/", everybody},
	{"build-index", "GET", "/v2/_catalog", only(proxy, origin, operator)},
	{"build-index", "GET", "/v2/<name>/tags/list", only(proxy, agent, operator)},
	{"build-index", "GET", "/v2/<name>/referrers/<digest>", only(proxy, agent, operator)},
	{"build-index", "GET", "/v2/<name>/manifests/<reference>", only(proxy, origin, agent, operator)},
	{"build-index", "PUT DELETE", "/v2/<name>/manifests/<reference>", only(proxy)},
	{"build-index", "GET", "/v2/<name>/_kraken/layers", only(proxy, origin, agent)},
	{"build-index", "PUT DELETE", "/v2/<name>/_kraken/layers", only(proxy)},
	{"build-index", "POST", "/v2/<name>/_kraken/mount", only(proxy)},
	{"build-index", "GET", "/v2/_kraken/upstreams", only(proxy, origin, agent)},
	{"build-index", "POST", "/v2/<name>/_kraken/members", only(proxy, agent)},
	{"build-index", "GET", "/v2/_kraken/repositories", only(proxy)},
	{"build-index", "GET", "/v2/_kraken/access", only(proxy, agent, operator)},
	{"build-index", "PUT", "/v2/_kraken/tokenkeys", only(proxy)},
	{"build-index", "PUT DELETE", "/v2/_kraken/robots", only(proxy, operator)},
	{"build-index", "GET", "/v2/<name>/_kraken/grant", only(proxy, origin, agent)},

	{"tracker", "GET", "/health", everybody},
	{"tracker", "GET", "/readiness", everybody},
	{"tracker", "POST", "/announce", only(agent)},
	{"tracker", "GET", "/announce", only()},
	{"tracker", "GET", "/blobs/<digest>/torrent", only(operator)},
	{"tracker", "GET", "/", only(operator)},
	{"tracker", "GET", "/swarms", only(operator)},

	{"proxy", "GET", "/health", everybody},
	{"proxy", "GET", "/readiness", everybody},
	{"proxy", "*", "*", people},

	{"agent", "GET", "/health", everybody},
	{"agent", "GET", "/readiness", everybody},
	{"agent", "*", "*", people},

	{Admin, "GET", "/health", only(operator, monitor)},
	{Admin, "GET", "/readiness", only(operator, monitor)},
	{Admin, "GET", "/metrics", only(operator, monitor)},
	{Admin, "*", "*", only(operator)},
}

// pattern returns what a path is called in Rights.
func pattern(path string) string {
	if p := registry.PatternOf(path); p != "" {
		return p
	}
	if d, ok := strings.CutSuffix(path, "/torrent"); ok && strings.HasPrefix(d, "/blobs/") && strings.Count(d, "/") == 2 {
		return "/blobs/<digest>/torrent"
	}
	return path
}

// verdict is what the table says of a request.
type verdict int

const (
	allowed  verdict = iota
	denied           // others may
	noMethod         // the path has other methods
	noPath           // nobody has such a path
)

// judge looks a request up in the table. OPTIONS, which tells the methods of a route, is for all who may use any.
func judge(at, method, path string, role transport.Role) verdict {
	if method == "HEAD" {
		method = "GET"
	}
	p, v := pattern(path), noPath
	for _, r := range Rights {
		if r.At != at || r.Path != p && r.Path != "*" {
			continue
		}
		has := r.Methods == "*" || method == "OPTIONS" || slices.Contains(strings.Fields(r.Methods), method)
		switch {
		case has && slices.Contains(r.Roles, role):
			return allowed
		case has:
			v = denied
		case v == noPath:
			v = noMethod
		}
	}
	return v
}
