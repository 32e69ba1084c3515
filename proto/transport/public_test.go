package transport

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/url"
	"os"
	"regexp"
	"syscall"
	"testing"
)

// inside are the addresses that the errors of these tests know.
var inside = regexp.MustCompile(`10\.1\.2\.3|fd00|internal|16031|/var/lib|http`)

// TestPublic: whatever Go's errors know of addresses stays inside, and what failed is still said, once.
func TestPublic(t *testing.T) {
	away := errors.New("not reachable now")
	addr := &net.TCPAddr{IP: net.IPv4(10, 1, 2, 3), Port: 16031}
	refused := &net.OpError{Op: "dial", Net: "tcp", Addr: addr, Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	get := func(err error) error {
		return &url.Error{Op: "Get", URL: "http://origin-01.internal:16031/v2/", Err: err}
	}
	written := errors.New(get(&net.OpError{Op: "write", Net: "tcp", Source: addr, Addr: addr, Err: syscall.EPIPE}).Error())
	for name, tc := range map[string]struct {
		err  error
		want string
	}{
		"refused":          {fmt.Errorf("%w: %w", away, get(refused)), "not reachable now: connection refused"},
		"named twice":      {fmt.Errorf("%w: origin-01: %w", away, fmt.Errorf("%w: %w", away, refused)), "not reachable now: origin-01: connection refused"},
		"two alike":        {fmt.Errorf("%w: %w", away, errors.Join(get(refused), get(refused))), "not reachable now: connection refused"},
		"two origins":      {errors.Join(fmt.Errorf("a: %w", refused), fmt.Errorf("b: %w", refused)), "a: connection refused; b: connection refused"},
		"no such host":     {get(&net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Name: "origin-01.internal", Server: "10.1.2.3:53", IsNotFound: true}}), "no such host"},
		"slow names":       {&net.DNSError{Name: "origin-01.internal", IsTimeout: true}, "name lookup timed out"},
		"address":          {&net.AddrError{Err: "missing port in address", Addr: "10.1.2.3"}, "missing port in address"},
		"certificate":      {get(x509.HostnameError{Certificate: &x509.Certificate{DNSNames: []string{"a.internal"}}, Host: "10.1.2.3"}), "certificate is of another name"},
		"file":             {fmt.Errorf("%w: %w", away, &fs.PathError{Op: "open", Path: "/var/lib/kraken/x", Err: syscall.EACCES}), "not reachable now: open: permission denied"},
		"cut":              {fmt.Errorf("read it: %w", get(io.ErrUnexpectedEOF)), "read it: unexpected EOF"},
		"text of a write":  {fmt.Errorf("%w: %w", away, written), "not reachable now: broken pipe"},
		"text of a dial":   {fmt.Errorf("%w: %s", away, refused), "not reachable now: connect: connection refused"},
		"text of a lookup": {errors.New("dial tcp: lookup origin-01.internal on 10.1.2.3:53: no such host"), "no such host"},
		"text with a URL":  {errors.New("origin o at http://10.1.2.3:16031: GET http://10.1.2.3:16031/v2/x: no progress"), "origin o: no progress"},
		"bare address":     {errors.New("valid for 10.1.2.3, not [fd00::1]:16031"), "valid for …, not …"},
	} {
		got := Public(tc.err)
		if inside.MatchString(got) {
			t.Errorf("%s: %q names an address", name, got)
		}
		if got != tc.want {
			t.Errorf("%s: %q, want %q", name, got, tc.want)
		}
	}
}

// TestPublicCause: words of the request stay, what Go's errors know goes.
func TestPublicCause(t *testing.T) {
	addr := &net.TCPAddr{IP: net.IPv4(10, 1, 2, 3), Port: 16031}
	err := fmt.Errorf("no mirror of %q: %w", "192.0.2.1:5000", &net.OpError{Op: "read", Net: "tcp", Source: addr, Addr: addr, Err: os.ErrDeadlineExceeded})
	if got := PublicCause(err); got != `no mirror of "192.0.2.1:5000": i/o timeout` {
		t.Error(got)
	}
}
