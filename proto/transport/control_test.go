package transport

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// TestControl: what changes the process, and profiles, are for operators on this machine or with a certificate, and for
// no page of a browser.
func TestControl(t *testing.T) {
	on := ServerConfig{Control: true, PProf: true}
	const here, elsewhere = "127.0.0.1:1000", "192.0.2.7:1000"
	for name, tc := range map[string]struct {
		cfg          ServerConfig
		method, path string
		from         string
		header       map[string]string
		tls          *tls.ConnectionState
		want         int
	}{
		"off":                        {ServerConfig{}, "PUT", "/limits", here, nil, nil, 403},
		"on":                         {on, "PUT", "/limits", here, nil, nil, 204},
		"from elsewhere":             {on, "PUT", "/limits", elsewhere, nil, nil, 403},
		"with a certificate":         {on, "PUT", "/limits", elsewhere, nil, &tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{{}}}}, 204},
		"TLS without one":            {on, "PUT", "/limits", elsewhere, nil, &tls.ConnectionState{}, 403},
		"a page of another site":     {on, "PUT", "/limits", here, map[string]string{"Sec-Fetch-Site": "cross-site"}, nil, 403},
		"of a sister":                {on, "PUT", "/limits", here, map[string]string{"Sec-Fetch-Site": "same-site"}, nil, 403},
		"of another origin":          {on, "PUT", "/limits", here, map[string]string{"Origin": "http://evil.example"}, nil, 403},
		"reads from another site":    {on, "GET", "/limits", here, map[string]string{"Sec-Fetch-Site": "cross-site"}, nil, 403},
		"typed into the browser":     {on, "GET", "/limits", here, map[string]string{"Sec-Fetch-Site": "none"}, nil, 204},
		"a form":                     {on, "POST", "/cache/scrub", here, nil, nil, 403},
		"a POST that says so":        {on, "POST", "/cache/scrub", here, map[string]string{"Kraken-Control": "1"}, nil, 204},
		"profiles":                   {on, "GET", "/debug/pprof/cmdline", here, nil, nil, 200},
		"profiles from elsewhere":    {on, "GET", "/debug/pprof/cmdline", elsewhere, nil, nil, 403},
		"profiles off":               {ServerConfig{Control: true}, "GET", "/debug/pprof/cmdline", here, nil, nil, 404},
		"metrics are for who scrape": {ServerConfig{}, "GET", "/metrics", elsewhere, nil, nil, 200},
	} {
		t.Run(name, func(t *testing.T) {
			done := func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }
			h := AdminHandler(tc.cfg, NewHealth(), prometheus.NewRegistry(), func(m *http.ServeMux) {
				m.HandleFunc("GET /limits", done)
				m.HandleFunc("PUT /limits", done)
				m.HandleFunc("POST /cache/scrub", done)
			})
			r := httptest.NewRequest(tc.method, tc.path, nil)
			r.RemoteAddr, r.TLS = tc.from, tc.tls
			for k, v := range tc.header {
				r.Header.Set(k, v)
			}
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if w.Code != tc.want {
				t.Errorf("%s %s: %d %s, want %d", tc.method, tc.path, w.Code, w.Body, tc.want)
			}
		})
	}
	for name, cfg := range map[string]ServerConfig{"registry": {Control: true}, "tracker": {PProf: true}, "admin": {PProf: true}} {
		cfg.Listen = "127.0.0.1:0"
		if s, err := NewServer(name, cfg, http.NotFoundHandler(), quiet()); err == nil {
			s.Close()
			t.Errorf("%s listener with %+v was accepted", name, cfg)
		}
	}
}

// TestOwnHosts: a page whose name was made to mean this machine is told that it is wrong here.
func TestOwnHosts(t *testing.T) {
	cfg := ServerConfig{Listen: "192.0.2.1:5000", Advertise: "node-1.example:5000", Hosts: []string{"Mirror.example", "[2001:db8::2]"}}
	local := net.TCPAddrFromAddrPort(netip.MustParseAddrPort("[::ffff:192.0.2.5]:5000"))
	for host, want := range map[string]int{
		"localhost": 200, "localhost:5000": 200, "LOCALHOST.": 200, "127.0.0.1:5000": 200, "127.1.2.3": 200, "[::1]:5000": 200,
		"192.0.2.1:5000": 200, "192.0.2.5:1": 200, "node-1.example": 200, "mirror.example:5000": 200, "[2001:db8::2]:5000": 200, "": 200,
		"evil.example": 421, "evil.example:5000": 421, "192.0.2.6": 421, "localhost.evil.example": 421, "127.0.0.1.evil.example": 421,
		"0.0.0.0:5000": 421, "[2001:db8::3]": 421, "node-1": 421,
	} {
		if got := hostStatus(cfg, local, host); got != want {
			t.Errorf("%q: status %d, want %d", host, got, want)
		}
		all := cfg
		all.Hosts = []string{"*"}
		if got := hostStatus(all, local, host); got != 200 {
			t.Errorf("%q with every name allowed: status %d", host, got)
		}
	}
	s := running(t, ServerConfig{Listen: "127.0.0.1:0"}, OwnHosts(ServerConfig{})(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})))
	for host, want := range map[string]int{"": 200, "evil.example": 421} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.URL(), nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Host = host
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("over a socket, %q: status %d, want %d", host, resp.StatusCode, want)
		}
	}
}

func hostStatus(cfg ServerConfig, local net.Addr, host string) int {
	h := OwnHosts(cfg)(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	r.Host = host
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, local)))
	return w.Code
}
