package registry

import (
	"net/http"
	"net/netip"

	"kraken/proto/transport"
)

// sourceOf returns whose upload a request begins: who a proxy says, where it is to be believed, else the connection's
// address, as transport.SourceOf.
func (s Server) sourceOf(r *http.Request) string {
	if s.TrustSource != nil && s.TrustSource(r) {
		h := s.Dialect.get(r.Header, s.Dialect.Source)
		ip, err := netip.ParseAddr(h)
		if p, perr := netip.ParsePrefix(h); perr == nil {
			ip, err = p.Addr(), nil
		}
		if err == nil {
			return transport.SourceName(transport.SourceNetwork(ip))
		}
	}
	return transport.SourceOf(r.RemoteAddr)
}
