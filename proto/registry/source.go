package registry

import (
	"net"
	"net/http"
	"net/netip"
)

// SourceOf returns whom a request from addr, host:port, is counted to: an IPv4 address, or the network of 64 bits of an
// IPv6 one, whose owner has all of it. Empty for what is no address.
func SourceOf(addr string) string {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return ""
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return ""
	}
	return sourceOf(ip)
}

func sourceOf(ip netip.Addr) string {
	ip = ip.Unmap().WithZone("")
	if ip.Is4() {
		return ip.String()
	}
	p, err := ip.Prefix(64)
	if err != nil {
		return ""
	}
	return p.String()
}

// sourceOf returns whose upload a request begins: who a proxy says, where it is to be believed, else the connection's
// address.
func (s Server) sourceOf(r *http.Request) string {
	if s.TrustSource != nil && s.TrustSource(r) {
		h := s.Dialect.get(r.Header, s.Dialect.Source)
		if ip, err := netip.ParseAddr(h); err == nil {
			return sourceOf(ip)
		}
		if p, err := netip.ParsePrefix(h); err == nil {
			return sourceOf(p.Addr())
		}
	}
	return SourceOf(r.RemoteAddr)
}
