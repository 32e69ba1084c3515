package registry

import (
	"net/http"
	"net/http/httptest"
	"testing"
)

// Only a proxy says whose upload it is.
func TestSourceOfAnUpload(t *testing.T) {
	for name, c := range map[string]struct {
		proxy      bool
		addr, says string
		want       string
	}{
		"a client":                    {false, "192.0.2.7:1", "", "192.0.2.7"},
		"a client that says another":  {false, "192.0.2.7:1", "192.0.2.8", "192.0.2.7"},
		"IPv6 is one network":         {false, "[2001:db8:1:2:3::9%eth0]:1", "", "2001:db8:1:2::/64"},
		"IPv4 in IPv6":                {false, "[::ffff:192.0.2.7]:1", "", "192.0.2.7"},
		"no address":                  {false, "@", "", ""},
		"a proxy":                     {true, "192.0.2.7:1", "192.0.2.8", "192.0.2.8"},
		"a proxy that says a network": {true, "192.0.2.7:1", "2001:db8:1:2::/64", "2001:db8:1:2::/64"},
		"nonsense":                    {true, "192.0.2.7:1", "x", "192.0.2.7"},
	} {
		r := httptest.NewRequest(http.MethodPost, "/", nil)
		r.RemoteAddr = c.addr
		r.Header.Set("Kraken-Source", c.says)
		if got := (Server{Dialect: dialect(), TrustSource: func(*http.Request) bool { return c.proxy }}).sourceOf(r); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}
