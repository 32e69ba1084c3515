package transport

import (
	"crypto/x509"
	"errors"
	"io/fs"
	"net"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"

	"kraken/proto/disk"
)

// Public returns what err says to clients: no address, no URL and no file name of this cluster, and each cause once.
// The whole of err is for the log.
func Public(err error) string {
	text := hidden(err)
	for _, m := range masks {
		text = m.pattern.ReplaceAllString(text, m.with)
	}
	return once(text)
}

// PublicCause is Public for errors about a request, whose text quotes the request: addresses are taken away where Go's
// errors hold them, and stay where they are words, such as a registry's name or a tag.
func PublicCause(err error) string { return once(hidden(err)) }

// masks take away what was an error once and is text now: of another process, or formatted without %w.
var masks = []struct {
	pattern *regexp.Regexp
	with    string
}{
	{regexp.MustCompile(` at "?https?://[^\s"]*[^\s":]"?`), ""},
	{regexp.MustCompile(`(\b[A-Z][A-Za-z]+ )?"?\bhttps?://[^\s"]*[^\s":]"?(: )?`), ""},
	{regexp.MustCompile(`\b(dial|read|write|accept|listen|set) (tcp|udp|unix)[46]?:? ?([^\s>]+->[^\s:]+(:\d+)?|[^\s>]+:\d+)?: `), ""},
	{regexp.MustCompile(`\blookup \S+?( on \S+)?: `), ""},
	{regexp.MustCompile(`\b\d{1,3}(\.\d{1,3}){3}(:\d{1,5})?\b`), "…"},
	{regexp.MustCompile(`\[[0-9a-fA-F:]*:[0-9a-fA-F:.]*(%\w+)?\](:\d{1,5})?`), "…"},
}

// hidden is the text of err with those parts of its chain that know addresses replaced by what they say about the
// failure.
func hidden(err error) string {
	switch e := err.(type) {
	case *url.Error:
		return hidden(e.Err)
	case *net.OpError:
		return hidden(e.Err)
	case *os.SyscallError:
		return hidden(e.Err)
	case *fs.PathError:
		return e.Op + ": " + hidden(e.Err)
	case *os.LinkError:
		return e.Op + ": " + hidden(e.Err)
	case *disk.FullError:
		return hidden(e.Err)
	case *net.AddrError:
		return e.Err
	case *net.DNSError:
		switch {
		case e.IsTimeout:
			return "name lookup timed out"
		case e.IsNotFound:
			return "no such host"
		}
		return "name lookup failed"
	case *net.ParseError, net.UnknownNetworkError, net.InvalidAddrError:
		return "address is not understood"
	case x509.HostnameError:
		return "certificate is of another name"
	}
	text := err.Error()
	for _, cause := range causes(err) {
		if said := cause.Error(); said != "" {
			text = strings.Replace(text, said, hidden(cause), 1)
		}
	}
	return text
}

func causes(err error) []error {
	switch e := err.(type) {
	case interface{ Unwrap() []error }:
		return slices.DeleteFunc(slices.Clone(e.Unwrap()), func(err error) bool { return err == nil })
	default:
		if cause := errors.Unwrap(err); cause != nil {
			return []error{cause}
		}
	}
	return nil
}

// once joins the lines of text, which errors.Join made, and drops what was said before: of the parts between colons
// those that are there already, save a line's last, which is its cause; and lines that say nothing new.
func once(text string) string {
	seen := map[string]bool{}
	var lines []string
	for line := range strings.Lines(text) {
		parts := strings.Split(strings.Trim(line, " :\n"), ": ")
		last := parts[len(parts)-1]
		var kept []string
		for i, p := range parts {
			if p == "" || i < len(parts)-1 && (seen[p] || p == last) || slices.Contains(kept, p) {
				continue
			}
			seen[p] = true
			kept = append(kept, p)
		}
		line = strings.Join(kept, ": ")
		if line != "" && !slices.ContainsFunc(lines, func(said string) bool { return said == line || strings.HasSuffix(said, ": "+line) }) {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "; ")
}
