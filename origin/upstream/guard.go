package upstream

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/net/http/httpproxy"
)

// ErrForbiddenAddress is an upstream, a realm or a redirect at an address that no request goes to unless it is allowed.
var ErrForbiddenAddress = errors.New("the address is not one of an upstream: loopback, link-local, metadata, or private where another host leads there (allow_addresses)")

// guard decides which addresses connections are made to. It looks at the address that is dialled, after the name was
// resolved, so that no name is looked at once and resolved to another place later.
type guard struct {
	allow   []netip.Prefix
	proxyOf func(*url.URL) (*url.URL, error) // as the environment says

	mu      sync.Mutex
	exact   map[netip.AddrPort]bool // literal addresses of configured endpoints
	proxies map[string]bool         // host:port of proxies that the environment names
}

func newGuard(allow []netip.Prefix) *guard {
	return &guard{allow: allow, proxyOf: httpproxy.FromEnvironment().ProxyFunc(), exact: map[netip.AddrPort]bool{}, proxies: map[string]bool{}}
}

// metadata are addresses of clouds' metadata services that are not link-local.
var metadata = []netip.Prefix{
	netip.MustParsePrefix("100.100.100.200/32"), netip.MustParsePrefix("168.63.129.16/32"), netip.MustParsePrefix("192.0.0.192/32"),
	netip.MustParsePrefix("fd00:ec2::254/128"), netip.MustParsePrefix("fd20:ce::254/128"),
}

// never are networks that no registry is in.
var never = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("240.0.0.0/4"), netip.MustParsePrefix("::/128"),
}

// local64 is for translations to IPv4 within a network (RFC 8215). It does not say where in an address the IPv4 one is.
var local64 = netip.MustParsePrefix("64:ff9b:1::/48")

// embedded returns the IPv4 addresses that one of local64 may stand for (RFC 6052, section 2.2).
func embedded(a netip.Addr) (out []netip.Addr) {
	b := a.As16()
	for _, at := range [][4]int{{6, 7, 9, 10}, {7, 9, 10, 11}, {9, 10, 11, 12}, {12, 13, 14, 15}} {
		if v := netip.AddrFrom4([4]byte{b[at[0]], b[at[1]], b[at[2]], b[at[3]]}); v.As4()[0] != 0 {
			out = append(out, v)
		}
	}
	return out
}

// translated are networks whose addresses stand for IPv4 ones in their last or middle bytes.
var translated = []struct {
	net netip.Prefix
	at  int
}{{netip.MustParsePrefix("64:ff9b::/96"), 12}, {netip.MustParsePrefix("2002::/16"), 2}, {netip.MustParsePrefix("::/96"), 12}}

// plain returns the address that a connection to a ends at: the IPv4 one of a mapped or translated address.
func plain(a netip.Addr) netip.Addr {
	a = a.Unmap().WithZone("")
	for _, t := range translated {
		if b := a.As16(); a.Is6() && t.net.Contains(a) && a != netip.IPv6Loopback() && !a.IsUnspecified() {
			return netip.AddrFrom4([4]byte(b[t.at : t.at+4]))
		}
	}
	return a
}

// class is how far an address is reached from.
type class int

const (
	outside   class = iota // the internet
	private                // RFC 1918, RFC 4193, RFC 6598, RFC 8215, site-local
	forbidden              // loopback, link-local, metadata, none at all
)

var shared, siteLocal = netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("fec0::/10")

func classOf(a netip.Addr) class {
	in := func(p netip.Prefix) bool { return p.Contains(a) }
	switch {
	case !a.IsValid(), a.IsLoopback(), a.IsLinkLocalUnicast(), a.IsMulticast(), a.IsUnspecified(), slices.ContainsFunc(metadata, in), slices.ContainsFunc(never, in):
		return forbidden
	case local64.Contains(a) && slices.ContainsFunc(embedded(a), func(v netip.Addr) bool { return classOf(v) == forbidden }):
		return forbidden
	case a.IsPrivate(), shared.Contains(a), siteLocal.Contains(a), local64.Contains(a):
		return private
	}
	return outside
}

// check returns nil where a connection of d's registry to an address may be made. dialled is the host:port that is
// dialled: another one than the registry's is a realm's, a redirect's or a proxy's.
func (g *guard) check(d *guardedDialer, dialled string, to netip.AddrPort) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	addr := plain(to.Addr())
	kind := classOf(addr)
	own := d.registry == dialled
	if own && kind != forbidden {
		d.inside = kind == private
	}
	switch {
	case g.exact[netip.AddrPortFrom(addr, to.Port())], g.proxies[dialled], slices.ContainsFunc(g.allow, func(p netip.Prefix) bool { return p.Contains(addr) }):
		return nil
	case kind == forbidden, kind == private && !own && !d.inside:
		return fmt.Errorf("%w: %s is at %s", ErrForbiddenAddress, dialled, addr)
	}
	return nil
}

// allowLiteral lets connections to the literal address of an endpoint be made.
func (g *guard) allowLiteral(u *url.URL) {
	if a, err := netip.ParseAddrPort(hostPort(u)); err == nil {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.exact[netip.AddrPortFrom(plain(a.Addr()), a.Port())] = true
	}
}

// dialer returns what makes connections for requests of a registry at host:port.
func (g *guard) dialer(registry string) *guardedDialer {
	return &guardedDialer{g: g, registry: registry}
}

// insideNames are hosts that are at this machine or at a cloud's metadata service wherever they are resolved.
var insideNames = []string{"localhost", "metadata", "metadata.google.internal", "instance-data", "instance-data.ec2.internal"}

// proxy returns the proxy of a request, as the environment said when the guard was made. What a proxy resolves is not
// seen here, so what is plainly inside is dialled directly, and looked at then.
func (g *guard) proxy(r *http.Request) (*url.URL, error) {
	p, err := g.proxyOf(r.URL)
	if p == nil || err != nil {
		return nil, err
	}
	host := strings.ToLower(strings.TrimSuffix(r.URL.Hostname(), "."))
	a, err := netip.ParseAddr(host)
	if err == nil && classOf(plain(a)) == forbidden || slices.Contains(insideNames, host) || strings.HasSuffix(host, ".localhost") {
		return nil, nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.proxies[hostPort(p)] = true
	return p, nil
}

// hostPort returns the host and the port that a URL leads to.
func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443", "socks5": "1080", "socks5h": "1080"}[u.Scheme]
	}
	return strings.ToLower(net.JoinHostPort(u.Hostname(), port))
}

// controlled returns a net.Dialer's Control that asks the guard.
func (d *guardedDialer) controlled(dialled string) func(network, address string, _ syscall.RawConn) error {
	return func(_, address string, _ syscall.RawConn) error {
		to, err := netip.ParseAddrPort(address)
		if err != nil {
			return fmt.Errorf("%w: %s", ErrForbiddenAddress, dialled)
		}
		return d.g.check(d, dialled, to)
	}
}
