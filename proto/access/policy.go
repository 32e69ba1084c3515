package access

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"kraken/proto/config"
	"kraken/proto/registry"
)

// Policy is the rules of a cluster, as their file has them; deploy/config/access.yaml is the commented sample. It is
// not changed after Validate.
type Policy struct {
	// Groups are names for several subjects.
	Groups []Group `yaml:"groups"`
	// Rules are looked at in order: the first one that is about the repository, the caller and the action decides. What
	// no rule allows is denied.
	Rules []Rule `yaml:"rules"`
}

// Group is a name for several subjects.
type Group struct {
	Name string `yaml:"name"`
	// Members are subjects; * stands for any characters, as in node:gpu-*.
	Members []string `yaml:"members"`
}

// Rule says what some callers may do in some repositories.
type Rule struct {
	// Name is shown where the rule decides, beside its number.
	Name string `yaml:"name"`
	// Repositories are patterns: * is any characters of one path element, ** any number of elements, ${user} the user's
	// name.
	Repositories []config.Literal `yaml:"repositories"`
	// Subjects are callers: users, robot+<name>, <issuer>:<subject>, cert:<name>, node:<id>, anonymous (everybody),
	// authenticated; * stands for any characters.
	Subjects []string `yaml:"subjects"`
	// Groups are callers by group: of Policy.Groups, or of an issuer's claim, <issuer>:<group>.
	Groups []string `yaml:"groups"`
	// Allow and Deny are actions: pull, push, delete, overwrite. Overwriting, which moves a tag to another manifest,
	// needs push as well.
	Allow []string `yaml:"allow"`
	Deny  []string `yaml:"deny"`

	patterns []Pattern
}

// ParsePolicy reads a file of rules.
func ParsePolicy(name string, b []byte) (*Policy, error) {
	var p Policy
	if err := config.Decode(name, bytes.NewReader(b), &p); err != nil {
		return nil, err
	}
	return &p, nil
}

var actions = []string{string(registry.ActionPull), string(registry.ActionPush), string(registry.ActionDelete), string(registry.ActionOverwrite)}

// Validate refuses rules that can't be meant, and makes the rest ready.
func (p *Policy) Validate() error {
	var m config.Mistakes
	for i, g := range p.Groups {
		key := fmt.Sprintf("groups[%d]", i)
		m.Need(key+".name", g.Name)
		if strings.ContainsAny(g.Name, ":*") {
			m.Add(key+".name", "%q: colons are of issuers' groups, and * of patterns", g.Name)
		}
		if slices.ContainsFunc(p.Groups[:i], func(o Group) bool { return o.Name == g.Name }) {
			m.Add(key+".name", "%q is there twice", g.Name)
		}
		for j, s := range g.Members {
			if s == Anonymous || s == "" {
				m.Add(fmt.Sprintf("%s.members[%d]", key, j), "%q is no member of a group: name it in the rule", s)
			}
		}
	}
	for i := range p.Rules {
		p.Rules[i].validate(&m, fmt.Sprintf("rules[%d]", i), p.Groups)
	}
	return m.Err()
}

func (r *Rule) validate(m *config.Mistakes, key string, groups []Group) {
	if len(r.Repositories) == 0 {
		m.Add(key+".repositories", `is needed: patterns, "**" for all`)
	}
	r.patterns = nil
	for i, s := range r.Repositories {
		p, err := ParsePattern(string(s))
		if err != nil {
			m.Add(fmt.Sprintf("%s.repositories[%d]", key, i), "%w", err)
		}
		r.patterns = append(r.patterns, p)
	}
	if len(r.Subjects)+len(r.Groups) == 0 {
		m.Add(key+".subjects", "is needed, or groups: who the rule is about; anonymous is everybody")
	}
	for i, s := range r.Subjects {
		if s == "" {
			m.Add(fmt.Sprintf("%s.subjects[%d]", key, i), "is empty")
		}
	}
	for i, g := range r.Groups {
		own := slices.ContainsFunc(groups, func(o Group) bool { return o.Name == g })
		if !own && !strings.Contains(g, ":") {
			m.Add(fmt.Sprintf("%s.groups[%d]", key, i), "%q is no group: groups above has none of this name, and an issuer's begins with <issuer>:", g)
		}
	}
	if len(r.Allow)+len(r.Deny) == 0 {
		m.Add(key+".allow", "is needed, or deny: actions, of %s", strings.Join(actions, ", "))
	}
	for list, as := range map[string][]string{"allow": r.Allow, "deny": r.Deny} {
		for i, a := range as {
			if !slices.Contains(actions, a) {
				m.Add(fmt.Sprintf("%s.%s[%d]", key, list, i), "%q is no action: want one of %s", a, strings.Join(actions, ", "))
			}
			if list == "deny" && slices.Contains(r.Allow, a) {
				m.Add(fmt.Sprintf("%s.deny[%d]", key, i), "%q is allowed by the same rule", a)
			}
		}
	}
}

// Decision is an answer, and why.
type Decision struct {
	Allowed bool
	// Why names the rule that decided, or says that none did.
	Why string
}

// Decide says whether rules allow the caller an action. Everybody who is known may enter, and ask for the catalog,
// which shows what they may pull; so may who shows nothing, where a rule lets everybody pull something.
func (p *Policy) Decide(c Caller, repository string, action registry.Action) Decision {
	if action == registry.ActionEnter || action == registry.ActionCatalog {
		switch {
		case c.Known():
			return Decision{true, "who is known may ask"}
		case p.anybody():
			return Decision{true, "a rule lets everybody pull something"}
		}
		return Decision{false, "no rule is for who shows no credentials"}
	}
	if action == registry.ActionOverwrite {
		if d := p.Decide(c, repository, registry.ActionPush); !d.Allowed {
			return Decision{false, "overwriting needs push: " + d.Why}
		}
	}
	groups := p.groupsOf(c)
	for i := range p.Rules {
		r := &p.Rules[i]
		allow, deny := slices.Contains(r.Allow, string(action)), slices.Contains(r.Deny, string(action))
		if !allow && !deny {
			continue
		}
		who, ok := r.isAbout(c, groups)
		if !ok || !slices.ContainsFunc(r.patterns, func(p Pattern) bool { return p.Matches(repository, c) }) {
			continue
		}
		name := fmt.Sprintf("rule %d", i+1)
		if r.Name != "" {
			name += fmt.Sprintf(" (%s)", r.Name)
		}
		verb := "denies"
		if allow {
			verb = "allows"
		}
		return Decision{allow, fmt.Sprintf("%s %s %s to %s in %s", name, verb, action, who, r.Repositories)}
	}
	return Decision{false, fmt.Sprintf("no rule lets %s %s in %s", c, action, repository)}
}

// anybody reports whether something may be pulled without a login.
func (p *Policy) anybody() bool {
	return slices.ContainsFunc(p.Rules, func(r Rule) bool {
		return slices.Contains(r.Subjects, Anonymous) && slices.Contains(r.Allow, string(registry.ActionPull))
	})
}

// groupsOf returns the caller's groups: those that it brings, and those of the policy.
func (p *Policy) groupsOf(c Caller) []string {
	groups := slices.Clone(c.Groups)
	for _, g := range p.Groups {
		if slices.ContainsFunc(g.Members, func(s string) bool { return subjectMatches(s, c) }) {
			groups = append(groups, g.Name)
		}
	}
	return groups
}

// isAbout reports whether a rule is about a caller, and as whom.
func (r *Rule) isAbout(c Caller, groups []string) (who string, ok bool) {
	for _, s := range r.Subjects {
		if subjectMatches(s, c) {
			return s, true
		}
	}
	for _, g := range r.Groups {
		if slices.Contains(groups, g) {
			return "group " + g, true
		}
	}
	return "", false
}

func subjectMatches(s string, c Caller) bool {
	switch s {
	case Anonymous:
		return true
	case Authenticated:
		return c.Known()
	}
	return c.Known() && wildcard(s, c.Subject)
}

// IsAction reports whether s is an action of rules.
func IsAction(s string) bool { return slices.Contains(actions, s) }
