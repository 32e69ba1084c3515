package transport

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// always looks at files each time.
const always lookEvery = 1

// replace gives file the content of another, at another time.
func replace(t *testing.T, file string, content []byte) {
	t.Helper()
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	stamp := time.Now().Add(time.Duration(1+len(content)) * time.Second)
	if err := os.Chtimes(file, stamp, stamp); err != nil {
		t.Fatal(err)
	}
}

func content(t *testing.T, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// serial is the number of a certificate, as openssl prints it.
func serial(t *testing.T, file string) string {
	t.Helper()
	block, _ := pem.Decode(content(t, file))
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return "serial=" + c.SerialNumber.Text(16) + " # gone astray\n"
}

// party is who takes part, with files of its own.
type party struct{ cert, key, ca, denied string }

func newParty(t *testing.T, a *authority, name string) party {
	dir := t.TempDir()
	p := party{filepath.Join(dir, "cert"), filepath.Join(dir, "key"), filepath.Join(dir, "ca"), filepath.Join(dir, "denied")}
	a.issue(t, name, p.cert, p.key)
	for file, b := range map[string][]byte{p.ca: content(t, a.file), p.denied: nil} {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// TestAuthorityIsReloaded: whom a listener and a client trust follows the files, on connections that are made and on
// ones that are open.
func TestAuthorityIsReloaded(t *testing.T) {
	t.Parallel()
	ca, next := newAuthority(t), newAuthority(t)
	server, client := newParty(t, ca, "server"), newParty(t, ca, "client")
	s := running(t, ServerConfig{
		Listen: "127.0.0.1:0", TLS: TLS{Cert: server.cert, Key: server.key, ClientCA: server.ca, DeniedSerials: server.denied, every: always},
	}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "hello") }))
	c, err := NewClient(ClientConfig{CA: client.ca, Cert: client.cert, Key: client.key, DeniedSerials: client.denied, every: always}, quiet())
	if err != nil {
		t.Fatal(err)
	}
	pool := c.Transport.(*progress).next.(*http.Transport)
	defer pool.CloseIdleConnections()
	get := func(when string, ok bool) {
		t.Helper()
		resp, err := c.Get(s.URL())
		if err == nil {
			readAll(t, resp.Body)
		}
		if (err == nil) != ok {
			t.Errorf("%s: %v", when, err)
		}
	}
	get("at first", true)
	replace(t, server.ca, content(t, next.file))
	pool.CloseIdleConnections()
	get("the listener's client_ca is another", false)
	replace(t, server.ca, content(t, ca.file))
	get("it is the old one again", true)

	replace(t, client.ca, content(t, next.file))
	pool.CloseIdleConnections()
	get("the client's ca is another", false)
	replace(t, client.ca, content(t, ca.file))
	get("it is the old one again", true)

	replace(t, server.denied, []byte(serial(t, client.cert)))
	get("the client is denied on its open connection", false)
	pool.CloseIdleConnections()
	get("and on a new one", false)
	replace(t, server.denied, []byte("no number"))
	get("a list that can't be read leaves the old one", false)
	replace(t, server.denied, nil)
	get("the list is empty", true)

	replace(t, client.denied, []byte(serial(t, server.cert)))
	get("the server is denied on an open connection", false)
	pool.CloseIdleConnections()
	get("and on a new one", false)
}

// TestPeerAuthorityIsReloaded: the same for peers, both sides.
func TestPeerAuthorityIsReloaded(t *testing.T) {
	t.Parallel()
	ca, next := newAuthority(t), newAuthority(t)
	accepts, dials := newParty(t, ca, "accepts"), newParty(t, ca, "dials")
	configs := func(p party) PeerConfigs {
		c, err := PeerTLS{Cert: p.cert, Key: p.key, CA: p.ca, DeniedSerials: p.denied, every: always}.Configs(nil, quiet())
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	server, client := configs(accepts), configs(dials)
	var open tls.ConnectionState
	shake := func(when string, ok bool) {
		t.Helper()
		a, b := sockets(t)
		defer a.Close()
		defer b.Close()
		accepted := make(chan error, 1)
		go func() {
			s := tls.Server(a, server.Server)
			err := s.Handshake()
			if err == nil {
				open = s.ConnectionState()
				_, err = s.Write([]byte("x"))
			}
			a.Close()
			accepted <- err
		}()
		_, err := io.ReadFull(tls.Client(b, client.Client), make([]byte, 1))
		b.Close()
		if err = errors.Join(err, <-accepted); (err == nil) != ok {
			t.Errorf("%s: %v", when, err)
		}
	}
	shake("at first", true)
	for who, p := range map[string]party{"the accepting side": accepts, "the dialling side": dials} {
		replace(t, p.ca, content(t, next.file))
		shake(who+" trusts another authority", false)
		replace(t, p.ca, content(t, ca.file))
		shake(who+" trusts the old one again", true)
	}
	if err := server.Check(open); err != nil {
		t.Error(err)
	}
	replace(t, accepts.denied, []byte(serial(t, dials.cert)))
	shake("who dials is denied", false)
	if err := server.Check(open); !errors.Is(err, ErrDenied) {
		t.Errorf("its open connection may stay: %v", err)
	}
	replace(t, accepts.denied, nil)
	replace(t, dials.denied, []byte(serial(t, accepts.cert)))
	shake("who accepts is denied", false)
}

// A read that fails for a reason of its own, too many open files say, is made again although the files do not change,
// and is logged once. A file that takes another's name is read, though it has the same size and time.
func TestReadAgain(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	stamp := time.Now().Add(-time.Hour)
	put := func(text string) {
		t.Helper()
		tmp := file + ".new"
		if err := errors.Join(os.WriteFile(tmp, []byte(text), 0o600), os.Chtimes(tmp, stamp, stamp), os.Rename(tmp, file)); err != nil {
			t.Fatal(err)
		}
	}
	put("one")
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		fails := 0
		r, err := newReloaded(slog.New(slog.NewTextHandler(&log, nil)), 0, func(f [][]byte) (string, error) {
			if fails > 0 {
				fails--
				return "", errors.New("too many open files")
			}
			return string(f[0]), nil
		}, file)
		if err != nil {
			t.Fatal(err)
		}
		want := func(when, text string) {
			t.Helper()
			time.Sleep(time.Second) // the bubble's clock
			if got, err := r.get(); err != nil || got != text {
				t.Errorf("%s: %q, %v, want %q", when, got, err, text)
			}
		}
		put("two")
		want("another file of the same size and time", "two")
		fails = 2
		put("three")
		want("it can't be read", "two")
		want("nor a second later", "two")
		want("and then it can", "three")
		if n := strings.Count(log.String(), "not usable"); n != 1 {
			t.Errorf("%d warnings, want 1:\n%s", n, &log)
		}
	})
}

func TestParseSerials(t *testing.T) {
	got, err := parseSerials([][]byte{[]byte("# gone\n\nserial=0A1B\n 0a:1C # stolen\r\nff")})
	if want := []string{"a1b", "a1c", "ff"}; err != nil || !slices.Equal(slices.Sorted(maps.Keys(got)), want) {
		t.Errorf("%v, %v, want %v", got, err, want)
	}
	for _, text := range []string{"xyz", "12 34", "0x12"} {
		if _, err := parseSerials([][]byte{[]byte(text)}); err == nil {
			t.Errorf("%q was read", text)
		}
	}
}
