package config

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Mistake is one thing that is wrong in a configuration.
type Mistake struct {
	Key  string // the path of the key, like origins[1].url; empty for the whole
	Line int    // of the key, or of the nearest key around it; 0 when there is none
	Err  error
}

func (m Mistake) Error() string {
	var b strings.Builder
	if m.Line > 0 {
		fmt.Fprintf(&b, "line %d: ", m.Line)
	}
	if m.Key != "" {
		b.WriteString(m.Key + ": ")
	}
	return b.String() + m.Err.Error()
}

// Unwrap returns what is wrong, without the place.
func (m Mistake) Unwrap() error { return m.Err }

// Mistakes collects all that is wrong in a configuration, so that one reading tells everything. Each message says what
// was found and what is expected in its place.
type Mistakes []Mistake

// Add notes what is wrong with a key.
func (m *Mistakes) Add(key, format string, args ...any) {
	*m = append(*m, Mistake{Key: key, Err: fmt.Errorf(format, args...)})
}

// Join adds what err tells: each of its Mistakes, their keys below key, or the error itself; nil adds nothing.
func (m *Mistakes) Join(key string, err error) {
	var more Mistakes
	switch {
	case err == nil:
	case errors.As(err, &more):
		for _, w := range more {
			w.Key = strings.TrimPrefix(key+"."+w.Key, ".")
			*m = append(*m, w)
		}
	default:
		*m = append(*m, Mistake{Key: key, Err: err})
	}
}

// Err is nil when there are none.
func (m Mistakes) Err() error {
	if len(m) == 0 {
		return nil
	}
	return m
}

func (m Mistakes) Error() string {
	if len(m) == 1 {
		return m[0].Error()
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%d mistakes:", len(m))
	for _, w := range m {
		b.WriteString("\n  " + w.Error())
	}
	return b.String()
}

// Unwrap lets errors.Is look at each.
func (m Mistakes) Unwrap() []error {
	errs := make([]error, len(m))
	for i, w := range m {
		errs[i] = w
	}
	return errs
}

// about reports whether one of the mistakes is about key, or about what is around it or in it.
func (m Mistakes) about(key string) bool {
	return slices.ContainsFunc(m, func(w Mistake) bool {
		return w.Key == key || within(key, w.Key) || within(w.Key, key)
	})
}

// within reports whether the path inner is below outer.
func within(inner, outer string) bool {
	rest, ok := strings.CutPrefix(inner, outer)
	return ok && outer != "" && (strings.HasPrefix(rest, ".") || strings.HasPrefix(rest, "["))
}

// Need refuses an empty value.
func (m *Mistakes) Need(key, value string) {
	if value == "" {
		m.Add(key, "is needed")
	}
}

// URL refuses what is no URL of a role.
func (m *Mistakes) URL(key, value string) {
	scheme, rest, ok := strings.Cut(value, "://")
	u, err := url.Parse(value)
	switch {
	case value == "":
		m.Add(key, "is needed: http://host:port or https://host:port")
	case !ok:
		m.Add(key, "%q has no scheme: want http://%[1]s or https://%[1]s", value)
	case scheme != "http" && scheme != "https":
		m.Add(key, "%q has the scheme %s: want http://%s or https://%[3]s", value, scheme, rest)
	case err != nil:
		m.Add(key, "%w: want %s://host:port", err, scheme)
	case u.User != nil:
		m.Add(key, "holds a user or password: want %s://%s", scheme, u.Host)
	case u.Hostname() == "" || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "":
		m.Add(key, "%q: want %s://host:port and nothing else", value, scheme)
	case u.Port() != "":
		m.port(key, value, u.Port())
	}
}

// Listen refuses what no listener can be bound to. An empty value is refused, too.
func (m *Mistakes) Listen(key, value string) {
	if value == "" {
		m.Add(key, "is needed: host:port, or :port for every address of this machine")
		return
	}
	_, port, err := net.SplitHostPort(value)
	if err != nil {
		m.notHostPort(key, value)
		return
	}
	m.port(key, value, port)
}

// HostPort refuses what others can't dial.
func (m *Mistakes) HostPort(key, value string) {
	host, port, err := net.SplitHostPort(value)
	switch {
	case err != nil:
		m.notHostPort(key, value)
	case host == "":
		m.Add(key, "%q names no host: want host:port", value)
	default:
		m.port(key, value, port)
	}
}

func (m *Mistakes) notHostPort(key, value string) {
	if _, err := strconv.ParseUint(value, 10, 16); err == nil {
		m.Add(key, "%q is a port alone: want host:port, like 127.0.0.1:%[1]s, or :%[1]s for every address of this machine", value)
		return
	}
	m.Add(key, "%q is not host:port, like 127.0.0.1:16000 or [::1]:16000", value)
}

func (m *Mistakes) port(key, value, port string) {
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		m.Add(key, "%q: port %q is not a number of 0 to 65535", value, port)
	}
}

// Path refuses a file or folder whose place depends on where the process was started.
func (m *Mistakes) Path(key, value string) {
	if value == "" {
		m.Add(key, "is needed: an absolute path")
	} else if !filepath.IsAbs(value) {
		m.Add(key, "%q is relative: want an absolute path", value)
	}
}

// Folder refuses, beside what Path does, what is there and is no folder. One that is missing is made later.
func (m *Mistakes) Folder(key, value string) {
	m.Path(key, value)
	if i, err := os.Stat(value); err == nil && !i.IsDir() {
		m.Add(key, "%q is a file: want a folder", value)
	}
}

// File refuses, beside what Path does, what is there and is a folder. One that is missing is made later.
func (m *Mistakes) File(key, value string) {
	m.Path(key, value)
	if i, err := os.Stat(value); err == nil && i.IsDir() {
		m.Add(key, "%q is a folder: want a file", value)
	}
}

// Pattern compiles a regular expression for whole texts and refuses what is none: the result is nil then.
func (m *Mistakes) Pattern(key, value string) *regexp.Regexp {
	if _, err := regexp.Compile(value); err != nil { // by itself: a)(b would become one by what is put around it
		m.Add(key, "%q is no regular expression: %w", value, err)
		return nil
	}
	return regexp.MustCompile(`^(?:` + value + `)$`)
}

// NotNegative refuses a number, size or time below zero.
func NotNegative[T ~int | ~int64](m *Mistakes, key string, v T) {
	if v < 0 {
		m.Add(key, "%v is negative", v)
	}
}
