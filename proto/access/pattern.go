package access

import (
	"fmt"
	"regexp"
	"strings"
)

// Pattern is a glob for repositories.
type Pattern struct {
	text     string
	elements []string
}

// userVariable stands for the user's name in a pattern.
const userVariable = "${user}"

// elementGrammar is what one element of a pattern may have besides variables.
var elementGrammar = regexp.MustCompile(`^[a-z0-9._*-]+$`)

// ParsePattern reads a pattern: path elements, of which * is any characters, ** any number of elements, ${user} the
// user's name.
func ParsePattern(s string) (Pattern, error) {
	p := Pattern{text: s, elements: strings.Split(s, "/")}
	if len(s) > maxPattern {
		return Pattern{}, fmt.Errorf("has %d bytes, at most %d", len(s), maxPattern)
	}
	for _, e := range p.elements {
		rest := strings.ReplaceAll(e, userVariable, "u")
		switch {
		case !elementGrammar.MatchString(rest):
			return Pattern{}, fmt.Errorf("%q is no pattern of repositories: want lower case path elements, of which * is any characters, ** any number of elements, ${user} the user's name", s)
		case strings.Contains(e, "**") && e != "**":
			return Pattern{}, fmt.Errorf("%q: ** stands alone between slashes", s)
		}
	}
	return p, nil
}

const maxPattern = 255

// Matches reports whether the pattern is about a repository, for a caller.
func (p Pattern) Matches(repository string, c Caller) bool {
	user, ok := c.user()
	if !ok && strings.Contains(p.text, userVariable) {
		return false
	}
	return matchElements(p.elements, strings.Split(repository, "/"), user)
}

// Plain is a Pattern of repositories alone, the same for all callers.
type Plain struct{ pattern Pattern }

// ParsePlain reads a pattern in which ${user} is not allowed.
func ParsePlain(s string) (Plain, error) {
	p, err := ParsePattern(s)
	if err == nil && strings.Contains(s, userVariable) {
		err = fmt.Errorf("%q: ${user} is for rules alone; here it would stand for nobody: write %s", s, strings.ReplaceAll(s, userVariable, "*"))
	}
	return Plain{p}, err
}

// Matches reports whether the pattern is about a repository.
func (p Plain) Matches(repository string) bool { return p.pattern.Matches(repository, Caller{}) }

// matchElements compares element by element. A ** is tried with no element first; after the first ** that fits, only
// the last one needs another try, so the time is bounded by the product of the lengths.
func matchElements(pattern, name []string, user string) bool {
	star, from := -1, 0
	i, j := 0, 0
	for j < len(name) {
		switch {
		case i < len(pattern) && pattern[i] == "**":
			star, from = i, j
			i++
		case i < len(pattern) && matchElement(pattern[i], name[j], user):
			i, j = i+1, j+1
		case star >= 0:
			from++
			i, j = star+1, from
		default:
			return false
		}
	}
	for i < len(pattern) && pattern[i] == "**" {
		i++
	}
	return i == len(pattern)
}

// matchElement compares one element. The user's name is taken as it is: a * in it stands for itself, which no
// repository has.
func matchElement(pattern, name, user string) bool {
	if !strings.Contains(pattern, userVariable) {
		return wildcard(pattern, name)
	}
	if strings.ContainsRune(user, '*') {
		return false
	}
	return wildcard(strings.ReplaceAll(pattern, userVariable, user), name)
}

// wildcard compares s with a pattern in which * is any number of any characters.
func wildcard(pattern, s string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == s
	}
	s, ok := strings.CutPrefix(s, parts[0])
	if !ok {
		return false
	}
	last := parts[len(parts)-1]
	for _, p := range parts[1 : len(parts)-1] {
		at := strings.Index(s, p)
		if at < 0 {
			return false
		}
		s = s[at+len(p):]
	}
	return strings.HasSuffix(s, last)
}
