package registry

import "strings"

// Challenge is one way to authenticate that a registry offers (RFC 9110 section 11.3), such as Bearer with a realm, a
// service and a scope.
type Challenge struct {
	Scheme     string            // in lower case
	Parameters map[string]string // names in lower case
}

// UnauthorizedError is a 401 with what the registry wants. It is an ErrUnauthorized.
type UnauthorizedError struct {
	Challenges []Challenge
	Err        error
}

func (e *UnauthorizedError) Error() string { return e.Err.Error() }

// Unwrap returns Err.
func (e *UnauthorizedError) Unwrap() error { return e.Err }

// maxChallenges bounds the challenges of one answer, and the parameters of one.
const maxChallenges = 16

// ParseChallenges reads the values of WWW-Authenticate, at most 16 challenges. What is none ends the list.
func ParseChallenges(values []string) (out []Challenge) {
	for _, v := range values {
		rest := strings.TrimLeft(v, " \t,")
		for rest != "" && len(out) < maxChallenges {
			scheme := token(rest)
			if scheme == "" {
				break
			}
			c := Challenge{strings.ToLower(scheme), map[string]string{}}
			rest = strings.TrimLeft(rest[len(scheme):], " \t")
			for len(c.Parameters) < maxChallenges {
				name, value, after, ok := parameter(rest)
				if !ok {
					break
				}
				c.Parameters[strings.ToLower(name)] = value
				rest = strings.TrimLeft(after, " \t,")
			}
			out = append(out, c)
			rest = strings.TrimLeft(rest, " \t,")
		}
	}
	return out
}

// token returns the token (RFC 9110 section 5.6.2) that s begins with.
func token(s string) string {
	n := strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("!#$%&'*+-.^_`|~", r))
	})
	if n < 0 {
		return s
	}
	return s[:n]
}

// parameter reads name=value or name="value" at the beginning of s.
func parameter(s string) (name, value, rest string, ok bool) {
	name = token(s)
	rest, ok = strings.CutPrefix(strings.TrimLeft(s[len(name):], " \t"), "=")
	if !ok || name == "" {
		return "", "", s, false
	}
	rest = strings.TrimLeft(rest, " \t")
	if !strings.HasPrefix(rest, `"`) {
		value = token(rest)
		return name, value, rest[len(value):], value != ""
	}
	var b strings.Builder
	for i := 1; i < len(rest); i++ {
		switch rest[i] {
		case '"':
			return name, b.String(), rest[i+1:], true
		case '\\':
			if i++; i == len(rest) {
				return "", "", s, false
			}
		}
		b.WriteByte(rest[i])
	}
	return "", "", s, false
}
