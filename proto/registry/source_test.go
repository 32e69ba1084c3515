package registry

import (
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"net/http/httptest"
	"testing"
)

// Only a role says whose upload it is.
func TestSourceOfAnUpload(t *testing.T) {
	role := &tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{}}}
	for name, c := range map[string]struct {
		trust      bool
		tls        *tls.ConnectionState
		addr, says string
		want       string
	}{
		"a client":                     {false, nil, "192.0.2.7:1", "", "192.0.2.7"},
		"a client that says another":   {false, nil, "192.0.2.7:1", "192.0.2.8", "192.0.2.7"},
		"IPv6 is one network":          {false, nil, "[2001:db8:1:2:3::9%eth0]:1", "", "2001:db8:1:2::/64"},
		"IPv4 in IPv6":                 {false, nil, "[::ffff:192.0.2.7]:1", "", "192.0.2.7"},
		"no address":                   {false, nil, "@", "", ""},
		"a role on a plain cluster":    {true, nil, "192.0.2.7:1", "192.0.2.8", "192.0.2.8"},
		"a role with a certificate":    {true, role, "192.0.2.7:1", "2001:db8:1:2::/64", "2001:db8:1:2::/64"},
		"somebody without certificate": {true, &tls.ConnectionState{}, "192.0.2.7:1", "192.0.2.8", "192.0.2.7"},
		"nonsense":                     {true, role, "192.0.2.7:1", "x", "192.0.2.7"},
	} {
		r := httptest.NewRequest(http.MethodPost, "/", nil)
		r.RemoteAddr, r.TLS = c.addr, c.tls
		r.Header.Set("Kraken-Source", c.says)
		if got := (Server{TrustSource: c.trust}).sourceOf(r); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}
