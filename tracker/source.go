package tracker

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"net/http"
	"net/netip"
	"slices"

	"kraken/proto/announce"
	"kraken/proto/cluster"
	"kraken/proto/transport"
)

// sourceKey names who is charged for what an announce takes: the address that the connection comes from, a /64 where it
// is IPv6, and the client certificate where there is one. The certificate alone would not do: a cluster may issue one
// for all of its nodes.
type sourceKey struct {
	prefix netip.Prefix
	cert   [16]byte // of the names in the certificate, which outlive its renewal; zero without one
}

// caller is who sent a request, as far as the connection proves it.
type caller struct {
	addr   netip.Addr // unmapped, without a zone
	source sourceKey
	cert   *x509.Certificate   // verified; nil without mutual TLS
	named  transport.Principal // by the certificate; zero for nobody
}

func callerOf(r *http.Request) (caller, error) {
	ap, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return caller{}, fmt.Errorf("your address is not known: %w", err)
	}
	c := callerAt(ap.Addr())
	if r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
		c.cert = r.TLS.PeerCertificates[0]
		h := sha256.New()
		fmt.Fprintf(h, "%q %q %v %v", c.cert.RawSubject, c.cert.DNSNames, c.cert.IPAddresses, c.cert.URIs)
		copy(c.source.cert[:], h.Sum(nil))
		if p, ok := cluster.Caller(r.Context()); ok && p.ID != "" {
			c.named = p
		}
	}
	return c, nil
}

// callerAt is a caller without a certificate.
func callerAt(a netip.Addr) caller {
	return caller{addr: a.Unmap().WithZone(""), source: sourceKey{prefix: transport.SourceNetwork(a)}}
}

// privileged is the first port that a process without privileges may listen at.
const privileged = 1024

// believe returns the addresses of said that others may be given, and a warning for the announcer where it is not what
// it said:
//   - an address that the connection comes from, or that the caller's certificate names, is believed;
//   - any loopback address is, of a caller on loopback, and of nobody else;
//   - with trust_announced_ip any other is;
//   - otherwise the connection's address takes its place, with the announced port, where both are of one family;
//   - of the other family it is unproven: it counts only if the same peer has announced it from that address.
func (t *Tracker) believe(ctx context.Context, c caller, said [2]netip.AddrPort) (proven, unproven [2]netip.AddrPort, warning string) {
	for i, a := range said {
		if !a.IsValid() {
			continue
		}
		ip := a.Addr()
		switch {
		case a.Port() < privileged && !t.cfg.PrivilegedPorts:
			warning = fmt.Sprintf("port %d is below %d, which this tracker gives to nobody (privileged_ports is off)", a.Port(), privileged)
		case !announce.Dialable(a):
			warning = fmt.Sprintf("address %s can't be dialled by others", a)
		case ip == c.addr, ip.IsLoopback() && c.addr.IsLoopback():
			proven[i] = a
		case !ip.IsLoopback() && (t.cfg.TrustAnnouncedIP || t.certified(ctx, c.cert, ip)):
			proven[i] = a
		case ip.Is4() == c.addr.Is4():
			if b := netip.AddrPortFrom(c.addr, a.Port()); announce.Dialable(b) {
				proven[i] = b
				warning = fmt.Sprintf("address %s is not where you announce from: others are given %s", a, b)
			}
		default:
			unproven[i] = a
		}
	}
	return proven, unproven, warning
}

// maxNames bounds the names of one certificate that are looked up.
const maxNames = 4

// certified reports whether the certificate names the address, itself or by a DNS name of it.
func (t *Tracker) certified(ctx context.Context, cert *x509.Certificate, ip netip.Addr) bool {
	if cert == nil {
		return false
	}
	for _, b := range cert.IPAddresses {
		if a, ok := netip.AddrFromSlice(b); ok && a.Unmap() == ip {
			return true
		}
	}
	for _, name := range cert.DNSNames[:min(maxNames, len(cert.DNSNames))] {
		if slices.Contains(t.resolver.addresses(ctx, name), ip) {
			return true
		}
	}
	return false
}
