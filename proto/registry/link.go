package registry

import (
	"net/url"
	"strings"
)

// nextPage returns the query of the link to the next page (RFC 8288), which may be absolute or relative and is asked
// for at the registry all the same; ok is false without such a link.
func nextPage(values []string) (q url.Values, ok bool) {
	rest := strings.Join(values, ",")
	for {
		_, after, found := strings.Cut(rest, "<")
		target, after, closed := strings.Cut(after, ">")
		if !found || !closed {
			return nil, false
		}
		params, _, _ := strings.Cut(after, "<")
		rest = after
		if !isNext(params) {
			continue
		}
		u, err := url.Parse(target)
		if err != nil {
			return nil, false
		}
		return u.Query(), true
	}
}

// isNext reports whether a link's parameters have rel="next", among others or not, in quotes or not.
func isNext(params string) bool {
	for p := range strings.FieldsFuncSeq(params, func(r rune) bool { return r == ';' || r == ',' }) {
		name, value, _ := strings.Cut(p, "=")
		if !strings.EqualFold(strings.TrimSpace(name), "rel") {
			continue
		}
		for rel := range strings.FieldsSeq(strings.Trim(strings.TrimSpace(value), `"`)) {
			if strings.EqualFold(rel, "next") {
				return true
			}
		}
	}
	return false
}
