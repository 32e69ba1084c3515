package transport

import "testing"

func TestSourceOf(t *testing.T) {
	for addr, want := range map[string]string{
		"192.0.2.7:1":                "192.0.2.7",
		"[2001:db8:1:2:3::9%eth0]:1": "2001:db8:1:2::/64",
		"[2001:db8:1:2:4::9]:2":      "2001:db8:1:2::/64",
		"[::ffff:192.0.2.7]:1":       "192.0.2.7",
		"[::1]:1":                    "::/64",
		"@":                          "",
		"":                           "",
		"origin-01:80":               "",
	} {
		if got := SourceOf(addr); got != want {
			t.Errorf("SourceOf(%q) = %q, want %q", addr, got, want)
		}
	}
}
