package transport

import (
	"net/netip"
)

// SourceNetwork returns the network that an address is counted to: itself if it is of IPv4, and its 64 bits of IPv6,
// since one host there has 2^64 addresses. IPv4 in IPv6 is IPv4. It is invalid for an invalid address.
func SourceNetwork(a netip.Addr) netip.Prefix {
	a = a.Unmap().WithZone("")
	bits := 64
	if a.Is4() {
		bits = 32
	}
	p, err := a.Prefix(bits)
	if err != nil {
		return netip.Prefix{} // of an invalid address
	}
	return p
}

// SourceName writes a SourceNetwork: an IPv4 address alone, an IPv6 network with its length, nothing for an invalid
// one.
func SourceName(p netip.Prefix) string {
	switch {
	case !p.IsValid():
		return ""
	case p.Addr().Is4():
		return p.Addr().String()
	}
	return p.String()
}

// SourceOf returns whom a request from addr, "host:port", is counted to, as SourceName writes it; empty for what is no
// address.
func SourceOf(addr string) string {
	from, err := netip.ParseAddrPort(addr)
	if err != nil {
		return ""
	}
	return SourceName(SourceNetwork(from.Addr()))
}
