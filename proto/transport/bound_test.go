package transport

import (
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"
)

// TestClientFrom: a client is seen at the address that it is to use, and at another where it has no such address.
func TestClientFrom(t *testing.T) {
	var seen string
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		seen, _, _ = net.SplitHostPort(r.RemoteAddr)
	}))
	defer s.Close()
	for from, want := range map[string]string{"127.0.0.77": "127.0.0.77", "192.0.2.1": "127.0.0.1", "::1": "127.0.0.1"} {
		c, err := NewClient(ClientConfig{From: netip.MustParseAddr(from)}, quiet())
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			resp, err := c.Get(s.URL)
			if err != nil {
				t.Fatalf("from %s: %v", from, err)
			}
			resp.Body.Close()
			c.CloseIdleConnections()
			if seen != want {
				t.Errorf("from %s: seen at %s, want %s", from, seen, want)
			}
		}
	}
}
