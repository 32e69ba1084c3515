package transport

import (
	"net"
	"net/netip"
	"strings"
	"testing"

	"kraken/proto/config"
)

func prefixes(t *testing.T, list string) (out []net.Addr) {
	t.Helper()
	for _, s := range strings.Fields(list) {
		ip, n, err := net.ParseCIDR(s)
		if err != nil {
			t.Fatal(err)
		}
		n.IP = ip
		out = append(out, n)
	}
	return out
}

// TestGlobalAddress: the first IPv4 address that others can reach, else the first such IPv6 address.
func TestGlobalAddress(t *testing.T) {
	for list, want := range map[string]string{
		"":                           "",
		"127.0.0.1/8 ::1/128":        "",
		"fe80::1/64 169.254.1.1/16":  "",
		"10.0.0.7/24 10.0.0.8/24":    "10.0.0.7",
		"fe80::1/64 2001:db8::7/64":  "2001:db8::7",
		"2001:db8::7/64 10.0.0.7/24": "10.0.0.7",
		"169.254.1.1/16 fd00::1/64":  "fd00::1",
	} {
		a, ok := globalOf(prefixes(t, list))
		if ok != (want != "") || ok && a != netip.MustParseAddr(want) {
			t.Errorf("%s: %s, want %q", list, a, want)
		}
	}
}

// TestAdvertiseByInterface: addresses stay as they are, and an interface's name becomes its address.
func TestAdvertiseByInterface(t *testing.T) {
	name, own := someInterface(t)
	for value, want := range map[string]struct{ peer, server string }{
		"":                   {"", ""},
		"10.0.0.7":           {"10.0.0.7", "10.0.0.7"},
		"10.0.0.7:99":        {"10.0.0.7:99", "10.0.0.7:99"},
		"[2001:db8::7]:99":   {"[2001:db8::7]:99", "[2001:db8::7]:99"},
		"tracker.example:99": {"!", "tracker.example:99"},
		"nosuch0":            {"!", "!"},
		"10.0.0.7:70000":     {"!", "!"},
		name:                 {own, own},
		name + ":99":         {net.JoinHostPort(own, "99"), net.JoinHostPort(own, "99")},
	} {
		if name == "" && strings.HasPrefix(value, ":") {
			continue
		}
		for way, got := range map[string]func(*config.Mistakes, string, string) string{"peer": ResolvePeer, "server": resolveServer} {
			w := want.peer
			if way == "server" {
				w = want.server
			}
			var m config.Mistakes
			v := got(&m, "advertise", value)
			if (w == "!") != (len(m) > 0) || w != "!" && v != w {
				t.Errorf("%s %q: %q, %v, want %q", way, value, v, m.Err(), w)
			}
		}
	}
}

// someInterface is one of this machine that others could reach, empty when there is none.
func someInterface(t *testing.T) (name, addr string) {
	t.Helper()
	all, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range all {
		if a, err := interfaceAddr(i.Name); err == nil {
			return i.Name, a.String()
		}
	}
	return "", ""
}
