package transport

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
)

// OwnHosts lets requests through whose Host is this listener's own: localhost, a loopback address, the address that the
// connection came to, the host of Listen and Advertise, and the names in Hosts ("*" is every name). Others are answered
// 421: a page that a browser loaded from elsewhere, and whose name was made to mean this machine since, reads nothing
// here.
func OwnHosts(cfg ServerConfig) func(http.Handler) http.Handler {
	names := []string{"localhost"}
	for _, hostPort := range []string{cfg.Listen, cfg.Advertise} {
		if host, _, err := net.SplitHostPort(hostPort); err == nil && host != "" {
			names = append(names, canonical(host))
		}
	}
	for _, h := range cfg.Hosts {
		names = append(names, canonical(h))
	}
	all := slices.Contains(names, "*")
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			local, real := r.Context().Value(http.LocalAddrContextKey).(net.Addr) // a recorder in a test has none
			if !all && real && !isOwnHost(r.Host, local, names) {
				refuse(w, http.StatusMisdirectedRequest, fmt.Sprintf("this listener does not answer for host %.100q: hosts in its configuration lists names", r.Host))
				return
			}
			next.ServeHTTP(w, r)
		})
	}
}

// canonical is a host as names are compared: without port, brackets and last dot, in lower case.
func canonical(hostPort string) string {
	host := hostPort
	if h, _, err := net.SplitHostPort(hostPort); err == nil {
		host = h
	}
	return strings.ToLower(strings.TrimSuffix(strings.Trim(host, "[]"), "."))
}

func isOwnHost(hostPort string, local net.Addr, names []string) bool {
	host := canonical(hostPort)
	if host == "" || slices.Contains(names, host) { // HTTP/1.0 needs no Host; no browser leaves it out
		return true
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return false
	}
	if ip.Unmap().IsLoopback() {
		return true
	}
	at, err := netip.ParseAddrPort(local.String())
	return err == nil && at.Addr().Unmap().WithZone("") == ip.Unmap().WithZone("")
}

// refuse answers with the specification's JSON.
func refuse(w http.ResponseWriter, status int, message string) {
	code := "DENIED"
	if status >= http.StatusInternalServerError {
		code = "UNAVAILABLE"
	}
	body, err := json.Marshal(map[string]any{"errors": []map[string]string{{"code": code, "message": message}}})
	if err != nil {
		body = []byte(`{"errors":[{"code":"DENIED","message":"refused"}]}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(body) // an error here is a client that went away
}
