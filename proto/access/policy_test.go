package access

import (
	"strings"
	"testing"

	"kraken/proto/registry"
)

const rules = `
groups:
  - {name: devs, members: [ann, bob, "node:gpu-*"]}
rules:
  - {name: frozen, repositories: ["team/frozen/**"], subjects: [anonymous], deny: [push, delete, overwrite]}
  - {repositories: ["public/**"], subjects: [anonymous], allow: [pull]}
  - {repositories: ["home/${user}/**", "home/${user}"], subjects: [authenticated], allow: [pull, push, delete, overwrite]}
  - {repositories: ["team/**"], groups: [devs], allow: [pull, push]}
  - {repositories: ["team/*/ci"], subjects: ["robot+ci", "github:repo:acme/*"], allow: [push]}
  - {repositories: ["team/**"], groups: ["github:acme"], allow: [pull]}
  - {repositories: ["**"], subjects: [root], allow: [pull, push, delete, overwrite]}
`

func policyOf(t testing.TB, text string) *Policy {
	t.Helper()
	p, err := ParsePolicy("rules.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// Who may do what: subject, repository, and the actions that are allowed of pull, push, delete, overwrite.
func TestRules(t *testing.T) {
	p := policyOf(t, rules)
	for _, c := range []struct {
		caller     Caller
		repository string
		want       string
	}{
		{Caller{}, "public/a", "pull"},
		{Caller{}, "public", "pull"},
		{Caller{}, "public2/a", ""},
		{Caller{}, "team/a", ""},
		{Caller{Subject: "ann"}, "public/a/b", "pull"},
		{Caller{Subject: "ann"}, "team/a", "pull push"},
		{Caller{Subject: "ann"}, "team/frozen/a", "pull"},
		{Caller{Subject: "root"}, "team/frozen/a", "pull"},
		{Caller{Subject: "root"}, "team/a", "pull push delete overwrite"},
		{Caller{Subject: "ann"}, "home/ann/x", "pull push delete overwrite"},
		{Caller{Subject: "ann"}, "home/ann", "pull push delete overwrite"},
		{Caller{Subject: "ann"}, "home/bob/x", ""},
		{Caller{Subject: "a*"}, "home/ann/x", ""},
		{Caller{Subject: "robot+ann"}, "home/ann/x", ""},
		{Caller{Subject: "github:ann"}, "home/ann/x", ""},
		{Caller{Subject: "cert:ann"}, "team/a", ""},
		{Caller{Subject: "node:gpu-7"}, "team/a", "pull push"},
		{Caller{Subject: "node:cpu-7"}, "team/a", ""},
		{Caller{Subject: "robot+ci"}, "team/a/ci", "push"},
		{Caller{Subject: "robot+ci"}, "team/a/b/ci", ""},
		{Caller{Subject: "github:repo:acme/app:ref"}, "team/a/ci", "push"},
		{Caller{Subject: "github:repo:evil/app:ref", Groups: []string{"github:acme"}}, "team/a/ci", "pull"},
		{Caller{Subject: "x:y", Groups: []string{"devs"}}, "team/a", "pull push"},
		{Caller{Subject: "eve"}, "team/a", ""},
	} {
		var got []string
		for _, a := range actions {
			if d := p.Decide(c.caller, c.repository, registry.Action(a)); d.Allowed {
				got = append(got, a)
			} else if d.Why == "" {
				t.Errorf("%s %s %s is denied without a word", c.caller, a, c.repository)
			}
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s in %s may %q, want %q", c.caller, c.repository, got, c.want)
		}
	}
}

// Nothing is allowed where there are no rules, and without a rule for everybody nobody enters unnamed.
func TestNoRules(t *testing.T) {
	p := policyOf(t, "")
	if p.Decide(Caller{Subject: "root"}, "a", registry.ActionPull).Allowed || p.Decide(Caller{}, "", registry.ActionCatalog).Allowed {
		t.Error("something is allowed by no rule")
	}
}

// A decision names the rule.
func TestDecisionNamesRule(t *testing.T) {
	d := policyOf(t, rules).Decide(Caller{Subject: "ann"}, "team/frozen/x", registry.ActionPush)
	if d.Allowed || !strings.Contains(d.Why, "rule 1 (frozen) denies push to anonymous") {
		t.Errorf("%+v", d)
	}
	d = policyOf(t, rules).Decide(Caller{Subject: "ann"}, "team/x", registry.ActionPush)
	if !d.Allowed || !strings.Contains(d.Why, "rule 4 allows push to group devs in [team/**]") {
		t.Errorf("%+v", d)
	}
}

func TestRulesRefused(t *testing.T) {
	for text, want := range map[string]string{
		"rules: [{subjects: [a], allow: [pull]}]":                                  "repositories",
		"rules: [{repositories: [A], subjects: [a], allow: [pull]}]":               "no pattern",
		"rules: [{repositories: ['a**'], subjects: [a], allow: [pull]}]":           "stands alone",
		"rules: [{repositories: ['${group}'], subjects: [a], allow: [pull]}]":      "no pattern",
		"rules: [{repositories: [a], allow: [pull]}]":                              "subjects",
		"rules: [{repositories: [a], groups: [devs], allow: [pull]}]":              "no group",
		"rules: [{repositories: [a], subjects: [a]}]":                              "allow",
		"rules: [{repositories: [a], subjects: [a], allow: [write]}]":              "no action",
		"rules: [{repositories: [a], subjects: [a], allow: [pull], deny: [pull]}]": "allowed by the same rule",
		"rules: [{repositories: [a], subjects: [a], allow: [pull], actions: [x]}]": "unknown key",
		"groups: [{name: a, members: [anonymous]}]":                                "no member",
		"groups: [{name: a, members: [b]}, {name: a, members: [c]}]":               "twice",
	} {
		if _, err := ParsePolicy("f", []byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

// A token allows what it was given for, and nothing that the rules no longer allow.
func TestTokenNarrows(t *testing.T) {
	p := policyOf(t, rules)
	ann := Caller{Subject: "ann", Scopes: p.Grant(Caller{Subject: "ann"}, ParseScopes([]string{"repository:team/a:pull,push,delete repository:team/b:*", "registry:catalog:*"}))}
	for _, c := range []struct {
		repository string
		action     registry.Action
		allowed    bool
		missing    bool
	}{
		{"team/a", "pull", true, false},
		{"team/a", "push", true, false},
		{"team/a", "delete", false, false},
		{"team/b", "push", true, false},
		{"team/c", "pull", false, true},
		{"", registry.ActionCatalog, true, false},
	} {
		d, missing := p.Allowed(ann, c.repository, c.action)
		if d.Allowed != c.allowed || missing != c.missing {
			t.Errorf("%s %s: %+v, missing %v", c.action, c.repository, d, missing)
		}
	}
	less := policyOf(t, "rules: [{repositories: ['**'], subjects: [bob], allow: [pull]}]")
	if d, _ := less.Allowed(ann, "team/a", "pull"); d.Allowed {
		t.Error("a token allows what the rules deny now")
	}
}

func FuzzPattern(f *testing.F) {
	for _, s := range []string{"**", "a/**/b", "team/${user}/*", "*a*b*"} {
		f.Add(s, "team/ann/x", "ann")
	}
	f.Fuzz(func(t *testing.T, pattern, repository, user string) {
		p, err := ParsePattern(pattern)
		if err != nil || registry.CheckName(repository) != nil {
			return
		}
		got := p.Matches(repository, Caller{Subject: user})
		if got && strings.Contains(pattern, userVariable) && !strings.Contains(repository, user) {
			t.Errorf("%q matches %q for %q", pattern, repository, user)
		}
		if pattern == "**" && !got {
			t.Errorf("** does not match %q", repository)
		}
	})
}
