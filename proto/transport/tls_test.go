package transport

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// authority is a throw-away certificate authority.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key := newKey(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, NotAfter: time.Now().AddDate(100, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "ca.pem")
	writePEM(t, file, "CERTIFICATE", der)
	return &authority{cert, key, file}
}

// issue writes a pair for localhost over cert and key.
func (a *authority) issue(t *testing.T, name, cert, key string) {
	t.Helper()
	k := newKey(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().AddDate(100, 0, 0),
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, k.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	kb, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, cert, "CERTIFICATE", der)
	writePEM(t, key, "PRIVATE KEY", kb)
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func writePEM(t *testing.T, file, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

func named(t *testing.T, p *reloaded[*tls.Certificate], want string) {
	t.Helper()
	c, err := p.get()
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(c.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	if leaf.Subject.CommonName != want {
		t.Errorf("the certificate is %q, want %q", leaf.Subject.CommonName, want)
	}
}

// TestReload: changed files are noticed within a second, and a pair that does not fit leaves the old one in use.
func TestReload(t *testing.T) {
	ca := newAuthority(t)
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	synctest.Test(t, func(t *testing.T) {
		stamp := time.Now()
		issue := func(name string) {
			ca.issue(t, name, cert, key)
			stamp = stamp.Add(time.Minute) // the file system's clock is not the bubble's
			for _, f := range []string{cert, key} {
				if err := os.Chtimes(f, stamp, stamp); err != nil {
					t.Fatal(err)
				}
			}
		}
		issue("first")
		p, err := newPair(cert, key, 0, quiet())
		if err != nil {
			t.Fatal(err)
		}
		named(t, p, "first")
		issue("second")
		named(t, p, "first")
		time.Sleep(time.Second)
		named(t, p, "second")

		if err := os.WriteFile(key, []byte("half a k"), 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		named(t, p, "second")
		if err := os.Remove(cert); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		named(t, p, "second")
		issue("third")
		time.Sleep(time.Second)
		named(t, p, "third")
	})
}

// TestMutualTLS: over real sockets, who shows a certificate of the authority gets in, others don't.
func TestMutualTLS(t *testing.T) {
	ca, stranger := newAuthority(t), newAuthority(t)
	dir := t.TempDir()
	file := func(n string) string { return filepath.Join(dir, n) }
	ca.issue(t, "server", file("server.pem"), file("server.key"))
	ca.issue(t, "client", file("client.pem"), file("client.key"))
	stranger.issue(t, "stranger", file("stranger.pem"), file("stranger.key"))
	s := running(t, ServerConfig{
		Listen: "127.0.0.1:0", TLS: TLS{Cert: file("server.pem"), Key: file("server.key"), ClientCA: ca.file},
	}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.TLS.PeerCertificates[0].Subject.CommonName)
	}))
	if !strings.HasPrefix(s.URL(), "https://127.0.0.1:") {
		t.Errorf("the URL is %s", s.URL())
	}
	for name, tc := range map[string]struct {
		cfg ClientConfig
		ok  bool
	}{
		"its own":             {ClientConfig{CA: ca.file, Cert: file("client.pem"), Key: file("client.key")}, true},
		"none":                {ClientConfig{CA: ca.file}, false},
		"another authority's": {ClientConfig{CA: ca.file, Cert: file("stranger.pem"), Key: file("stranger.key")}, false},
		"an unknown server":   {ClientConfig{CA: stranger.file, Cert: file("client.pem"), Key: file("client.key")}, false},
	} {
		c, err := NewClient(tc.cfg, quiet())
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.Get(s.URL())
		if err == nil {
			if who := readAll(t, resp.Body); who != "client" {
				t.Errorf("%s: the server saw %q", name, who)
			}
		}
		if (err == nil) != tc.ok {
			t.Errorf("%s: %v", name, err)
		}
		c.Transport.(*progress).next.(*http.Transport).CloseIdleConnections()
	}
}

func TestPeerTLS(t *testing.T) {
	ca, stranger := newAuthority(t), newAuthority(t)
	dir := t.TempDir()
	id := func(a *authority, name, ca string) PeerTLS {
		p := PeerTLS{Cert: filepath.Join(dir, name+".pem"), Key: filepath.Join(dir, name+".key"), CA: ca}
		a.issue(t, name, p.Cert, p.Key)
		return p
	}
	member := id(ca, "member", ca.file)
	for name, tc := range map[string]struct {
		accepts, dials PeerTLS
		ok             bool
	}{
		"two members":         {member, id(ca, "another", ca.file), true},
		"a stranger dials":    {member, id(stranger, "dialler", ca.file), false},
		"a stranger accepts":  {id(stranger, "acceptor", ca.file), member, false},
		"of two authorities":  {id(stranger, "one", stranger.file), member, false},
		"no name is compared": {member, member, true},
	} {
		t.Run(name, func(t *testing.T) {
			accepts, err := tc.accepts.Configs(nil, quiet())
			if err != nil {
				t.Fatal(err)
			}
			dials, err := tc.dials.Configs(nil, quiet())
			if err != nil {
				t.Fatal(err)
			}
			a, b := sockets(t) // a pipe has no buffer: two ends that refuse each other at once would wait for ever
			defer a.Close()
			defer b.Close()
			accepted := make(chan error, 1)
			go func() {
				s := tls.Server(a, accepts.Server)
				err := s.Handshake()
				if err == nil {
					_, err = s.Write([]byte("x"))
				}
				a.Close()
				accepted <- err
			}()
			c := tls.Client(b, dials.Client)
			_, err = io.ReadFull(c, make([]byte, 1))
			b.Close()
			if other := <-accepted; (err == nil && other == nil) != tc.ok {
				t.Errorf("the dialling side: %v, the accepting one: %v", err, other)
			}
		})
	}
	for name, p := range map[string]PeerTLS{"no authority": {Cert: member.Cert, Key: member.Key}, "no key": {Cert: member.Cert, CA: member.CA}, "only an authority": {CA: member.CA}} {
		if _, err := p.Configs(nil, quiet()); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	if c, err := (PeerTLS{}).Configs(nil, quiet()); c.Server != nil || c.Client != nil || err != nil {
		t.Error("nothing configured is not nothing")
	}
}

func TestOldTLSIsRefused(t *testing.T) {
	ca := newAuthority(t)
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	ca.issue(t, "server", cert, key)
	s := running(t, ServerConfig{Listen: "127.0.0.1:0", TLS: TLS{Cert: cert, Key: key}}, http.NotFoundHandler())
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	for v, ok := range map[uint16]bool{tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: true} {
		c, err := tls.Dial("tcp", s.Addr(), &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS10, MaxVersion: v})
		if err == nil {
			c.Close()
		}
		if (err == nil) != ok {
			t.Errorf("%s: %v", tls.VersionName(v), err)
		}
	}
}

func TestTLSConfigurationIsRefused(t *testing.T) {
	ca := newAuthority(t)
	dir := t.TempDir()
	cert, key, text := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"), filepath.Join(dir, "text")
	ca.issue(t, "server", cert, key)
	if err := os.WriteFile(text, []byte("no PEM"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, cfg := range map[string]TLS{
		"certificate alone":  {Cert: cert},
		"key alone":          {Key: key},
		"authority alone":    {ClientCA: ca.file},
		"no such files":      {Cert: cert + ".no", Key: key + ".no"},
		"not PEM":            {Cert: text, Key: text},
		"no such authority":  {Cert: cert, Key: key, ClientCA: text + ".no"},
		"authority is empty": {Cert: cert, Key: key, ClientCA: text},
		"no such list":       {Cert: cert, Key: key, ClientCA: ca.file, DeniedSerials: text + ".no"},
		"list of words":      {Cert: cert, Key: key, ClientCA: ca.file, DeniedSerials: text},
		"list for nobody":    {Cert: cert, Key: key, DeniedSerials: os.DevNull},
	} {
		s, err := NewServer("test", ServerConfig{Listen: "127.0.0.1:0", TLS: cfg}, http.NotFoundHandler(), quiet())
		if err == nil {
			s.Close()
			t.Errorf("%s: accepted", name)
		}
	}
}

// sockets are both ends of a connection over loopback.
func sockets(t *testing.T) (accepted, dialled net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if dialled, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if accepted, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return accepted, dialled
}
