package access

import (
	"net/url"
	"strings"

	"kraken/proto/config"
	"kraken/proto/registry"
)

// Challenge returns a value of WWW-Authenticate that sends a client to a token service. kind is an error of RFC 6750,
// empty for a request that showed nothing.
func Challenge(realm, service, repository string, action registry.Action, kind string) string {
	var b strings.Builder
	b.WriteString(`Bearer realm="` + quoted(realm) + `",service="` + quoted(service) + `"`)
	if s, ok := scopeOf(repository, action); ok {
		b.WriteString(`,scope="` + quoted(s.String()) + `"`)
	}
	if kind != "" {
		b.WriteString(`,error="` + kind + `"`)
	}
	return b.String()
}

// CheckRealm notes a realm, unless empty, that is no URL of a token service.
func CheckRealm(m *config.Mistakes, key, realm string) {
	checkURL(m, key, realm, "the URL of the token service, such as https://registry.example/token")
}

// checkURL notes a value, unless empty, that is no URL, which may have a path.
func checkURL(m *config.Mistakes, key, value, want string) {
	if value == "" {
		return
	}
	if u, err := url.Parse(value); err != nil || u.Host == "" || u.User != nil || (u.Scheme != "https" && u.Scheme != "http") {
		m.Add(key, "%.200q: want %s", value, want)
	}
}

// quoted leaves out what ends a quoted string, or a header.
func quoted(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '"' || r == '\\' || r < 0x20 || r == 0x7f {
			return -1
		}
		return r
	}, s)
}
