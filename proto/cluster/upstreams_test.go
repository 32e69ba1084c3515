package cluster

import (
	"regexp"
	"strings"
	"testing"

	"kraken/proto/registry"
)

func TestSplitUpstream(t *testing.T) {
	for name, want := range map[string][2]string{
		"docker.io/library/nginx":      {"docker.io", "library/nginx"},
		"registry.corp_5000/a/b":       {"registry.corp:5000", "a/b"},
		"localhost_5000/a":             {"localhost:5000", "a"},
		"127.0.0.1_16000/a":            {"127.0.0.1:16000", "a"},
		"registry-1.docker.io/bitnami": {"docker.io", "bitnami"},
		"registry.k8s.io/pause":        {"registry.k8s.io", "pause"},
	} {
		host, rest, ok := SplitUpstream(name)
		if !ok || host != want[0] || rest != want[1] {
			t.Errorf("%s: %q, %q, %v", name, host, rest, ok)
		}
	}
	for _, name := range []string{"nginx", "team/app", "a_b/c", "docker.io", "team_x/y", "team_123456/y", "team_1/y", "library/nginx.d"} {
		if host, rest, ok := SplitUpstream(name); ok {
			t.Errorf("%s is an upstream's: %q, %q", name, host, rest)
		}
	}
}

func TestJoinUpstream(t *testing.T) {
	for _, c := range [][3]string{
		{"docker.io", "nginx", "docker.io/library/nginx"},
		{"index.docker.io", "bitnami/redis", "docker.io/bitnami/redis"},
		{"Registry.Corp:5000", "a/b", "registry.corp_5000/a/b"},
		{"registry.k8s.io", "pause", "registry.k8s.io/pause"},
	} {
		name, err := JoinUpstream(c[0], c[1])
		if err != nil || name != c[2] {
			t.Errorf("%s, %s: %q, %v", c[0], c[1], name, err)
			continue
		}
		host, rest, ok := SplitUpstream(name)
		if again, err := JoinUpstream(host, rest); !ok || err != nil || again != name {
			t.Errorf("%s: back it is %q, %v", name, again, err)
		}
	}
	for _, host := range []string{"", "[::1]:5000", "a/b", "a b", "a:b:5", "kraken", "team"} {
		if name, err := JoinUpstream(host, "x"); err == nil {
			t.Errorf("%q: %s", host, name)
		}
	}
}

func TestUpstreamsMatch(t *testing.T) {
	u := Upstreams{
		Upstreams: []Upstream{{Registry: "docker.io"}, {Registry: "registry.corp:5000", Modes: []RepositoryMode{{"open/**", ModePublic}, {"**", ModeCaller}}}, {Registry: "*"}},
		Deny:      []string{"*.evil.example", "metadata.*"},
	}
	for host, want := range map[string]string{"docker.io": "docker.io", "index.docker.io": "docker.io", "REGISTRY.corp_5000": "registry.corp:5000", "ghcr.io": "*", "a.b.evil.example": "", "metadata.google.internal": "", "": ""} {
		if up, ok := u.Match(host); up.Registry != want || ok != (want != "") || u.Mirrors(host) != ok {
			t.Errorf("%s: %+v, %v", host, up, ok)
		}
	}
	corp, _ := u.Match("registry.corp:5000")
	for repo, want := range map[string]Mode{"open/a/b": ModePublic, "open": ModeCaller, "secret/a": ModeCaller} {
		if got := corp.Mode(repo); got != want {
			t.Errorf("%s: %s", repo, got)
		}
	}
	if (Upstreams{}).Mirrors("docker.io") || (Upstreams{}).Any() {
		t.Error("none is configured")
	}
}

func FuzzMatchGlob(f *testing.F) {
	for _, s := range [][2]string{{"*", "a"}, {"a/*/c", "a/b/c"}, {"a/*/c", "a/b/b/c"}, {"**", "a/b"}, {"**/x*y", "a/b/xx/xzy"}, {"*a*b*", "xaxb"}, {"*/**/*b", "a/c/ab"}} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, pattern, s string) {
		if len(pattern) > 30 || len(s) > 100 {
			return
		}
		var re strings.Builder
		for rest := pattern; rest != ""; {
			switch {
			case strings.HasPrefix(rest, "**"):
				re.WriteString(`(?s:.*)`)
				rest = rest[2:]
			case rest[0] == '*':
				re.WriteString(`[^/]*`)
				rest = rest[1:]
			default:
				re.WriteString(regexp.QuoteMeta(rest[:1]))
				rest = rest[1:]
			}
		}
		want, err := regexp.Compile("^" + re.String() + `\z`)
		if err != nil {
			return // not UTF-8
		}
		if got := MatchGlob(pattern, s); got != want.MatchString(s) {
			t.Errorf("%q, %q: %v", pattern, s, got)
		}
	})
}

// What a runtime names in ?ns= and what is in a path reach a name or an error, and a name is split as it was joined.
func FuzzSplitUpstream(f *testing.F) {
	for _, s := range [][2]string{{"docker.io", "nginx"}, {"a.b:5000", "c"}, {"a.b_5000", "c/d"}, {"x_1_2", "y"}} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, host, repo string) {
		name, err := JoinUpstream(host, repo)
		if err != nil {
			return
		}
		if err := registry.CheckName(name); err != nil {
			t.Fatal(err)
		}
		if h, rest, ok := SplitUpstream(name); ok {
			if again, err := JoinUpstream(h, rest); err != nil || again != name {
				t.Errorf("%q, %q: %q is %q, %v", host, repo, name, again, err)
			}
		}
	})
}
