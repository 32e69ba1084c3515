package transport

import (
	"errors"
	"net/http"
	"net/http/pprof"
	"net/netip"
)

// gate is the way to what operators may change, and to profiles: open only where the configuration says so, to clients
// on this machine and to ones with a certificate, and to no page that a browser shows.
type gate struct {
	cfg    ServerConfig
	routes *http.ServeMux
	cross  *http.CrossOriginProtection
}

func newGate(cfg ServerConfig, control []func(*http.ServeMux)) http.Handler {
	g := &gate{cfg, http.NewServeMux(), http.NewCrossOriginProtection()}
	for _, add := range control {
		add(g.routes)
	}
	if cfg.PProf {
		g.routes.HandleFunc("GET /debug/pprof/", pprof.Index)
		g.routes.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
		g.routes.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		g.routes.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		g.routes.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	return g
}

// ServeHTTP implements http.Handler.
func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if _, pattern := g.routes.Handler(r); pattern != "" {
		if err := g.check(r); err != nil {
			refuse(w, http.StatusForbidden, err.Error())
			return
		}
	}
	g.routes.ServeHTTP(w, r)
}

func (g *gate) check(r *http.Request) error {
	if !g.cfg.Control {
		return errors.New("control is off: admin.control in the configuration turns it on")
	}
	if from, err := netip.ParseAddrPort(r.RemoteAddr); (err != nil || !from.Addr().Unmap().IsLoopback()) && (r.TLS == nil || len(r.TLS.VerifiedChains) == 0) {
		return errors.New("control is for clients on this machine, or with a certificate of admin.tls.client_ca")
	}
	if site := r.Header.Get("Sec-Fetch-Site"); site != "" && site != "none" && site != "same-origin" {
		return errors.New("control is not for pages of other sites")
	}
	if err := g.cross.Check(r); err != nil {
		return err
	}
	// What a form can send without asking first.
	if r.Method == http.MethodPost && r.Header.Get("Kraken-Control") == "" {
		return errors.New("a POST needs the header Kraken-Control, with any value")
	}
	return nil
}
