package transport

import "net/http"

// ClientNames returns the names in the certificate that a client showed and that was verified: the common name and the
// alternative DNS names and URIs. ok is false for a request without one: the listener wants none.
func ClientNames(r *http.Request) (names []string, ok bool) {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return nil, false
	}
	c := r.TLS.VerifiedChains[0][0]
	if c.Subject.CommonName != "" {
		names = append(names, c.Subject.CommonName)
	}
	names = append(names, c.DNSNames...)
	for _, u := range c.URIs {
		names = append(names, u.String())
	}
	return names, true
}
