package abuse

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"sync"
	"testing"
	"time"
)

// TestControlIsApart: what changes a process is neither at its main listener nor, unless configured, at its admin
// listener, and no page of a browser gets there; metrics and health go on.
func TestControlIsApart(t *testing.T) {
	off := map[string]any{"admin": map[string]any{"control": false, "pprof": false}}
	c := start(t, options{agents: 1, config: map[string]map[string]any{"agent": off, "kraken-origin-02": off, "tracker": off, "build-index": off, "proxy": off}})
	control := []struct{ method, path string }{
		{"PUT", "/limits"}, {"GET", "/limits"}, {"POST", "/cache/scrub"}, {"PUT", "/cache/pins/sha256:" + fill(64, "0")}, {"GET", "/debug/pprof/"},
		{"GET", "/debug/pprof/heap"}, {"GET", "/debug/pprof/profile?seconds=1"}, {"POST", "/debug/pprof/symbol"},
	}
	hc := c.client(t)
	refused := func(p *process, base string, header ...string) {
		t.Helper()
		for _, q := range control {
			if a := do(t, hc, q.method, base, q.path, []byte("{}"), header...); a.status < 400 || a.status >= 500 {
				t.Errorf("%s: %s %s with %v: status %d: %.200s", p.Name, q.method, q.path, header, a.status, a.body)
			}
		}
	}
	for _, p := range c.all() {
		refused(p, p.URL, "Kraken-Control", "1")
		for _, path := range []string{"/health", "/readiness", "/metrics"} {
			do(t, hc, "GET", p.AdminURL, path, nil).want(t, http.StatusOK, p.Name+" "+path)
		}
		if p.Name != "kraken-origin-01" && p.Name != "kraken-origin-03" {
			refused(p, p.AdminURL, "Kraken-Control", "1")
		}
	}
	on := c.Origins[0]
	refused(on, on.AdminURL, "Sec-Fetch-Site", "cross-site", "Kraken-Control", "1")
	refused(on, on.AdminURL, "Sec-Fetch-Site", "same-site", "Origin", "http://127.0.0.1:9")
	do(t, hc, "POST", on.AdminURL, "/cache/scrub", nil, "Content-Type", "text/plain").want(t, http.StatusForbidden, "what a form can send")
	do(t, hc, "PUT", on.AdminURL, "/limits", []byte("{}"), "Origin", "http://evil.example").want(t, http.StatusForbidden, "a page of another site")
	do(t, hc, "GET", on.AdminURL, "/limits", nil).want(t, http.StatusOK, "an operator")
}

// TestOtherHosts: a page of a browser, whose name was made to mean this machine, gets nothing from an agent, the
// tracker's page and the admin listeners.
func TestOtherHosts(t *testing.T) {
	c := shared(t)
	ask := func(addr, path, host string) int {
		got, _ := raw(t, addr, nil, 5*time.Second, false, fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", path, host))
		return statusOf(got)
	}
	at := map[string]string{c.Agents[0].Addr: "/v2/_catalog", c.Tracker.Addr: "/swarms"}
	for _, p := range c.all() {
		at[p.Admin] = "/metrics"
	}
	for addr, path := range at {
		for _, host := range []string{"evil.example", "evil.example:80", "127.0.0.1.evil.example", "192.0.2.1"} {
			if status := ask(addr, path, host); status != http.StatusMisdirectedRequest {
				t.Errorf("%s%s as %s: status %d, want 421", addr, path, host, status)
			}
		}
		if status := ask(addr, path, addr); status != http.StatusOK {
			t.Errorf("%s%s: status %d", addr, path, status)
		}
	}
}

// TestSilentPeers: a thousand connections to a node's peer listener say nothing, and are opened again when they are
// closed. Another node gets a blob from it all the same, which is nowhere else.
func TestSilentPeers(t *testing.T) {
	for _, mutual := range []bool{false, true} {
		t.Run(fmt.Sprintf("mutual TLS %v", mutual), func(t *testing.T) {
			c := start(t, options{agents: 2, mutualTLS: mutual})
			content := random(8 << 20)
			push(t, c.client(t), c.Proxy.URL, "silent/app", "v1", content)
			pull(t, c.client(t), c.Agents[0].URL, "silent/app", "v1")
			for _, addr := range []string{"127.0.0.2", "127.0.0.3", "127.0.0.1"} {
				defer silence(t, addr, c.Agents[0].Peer, 334)()
			}
			for _, o := range c.Origins {
				o.kill(t)
			}
			if _, layers := pull(t, c.client(t), c.Agents[1].URL, "silent/app", "v1"); !bytes.Equal(layers[0], content) {
				t.Error("another image")
			}
		})
	}
}

// silence keeps n connections from an address to another open and says nothing, until the result is called.
func silence(t *testing.T, from, to string, n int) (end func()) {
	t.Helper()
	ended := make(chan struct{})
	var all sync.WaitGroup
	var open sync.WaitGroup
	open.Add(n)
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 5 * time.Second}
	for range n {
		all.Go(func() {
			first := sync.OnceFunc(open.Done)
			defer first()
			for {
				conn, err := d.Dial("tcp", to)
				first()
				if err == nil {
					stop := make(chan struct{})
					go func() {
						select {
						case <-ended:
						case <-stop:
						}
						conn.Close()
					}()
					io.Copy(io.Discard, conn) // until it is closed
					close(stop)
				}
				select {
				case <-ended:
					return
				case <-time.After(200 * time.Millisecond): // not to take the processor away
				}
			}
		})
	}
	open.Wait()
	return func() { close(ended); all.Wait() }
}

// TestNewAuthority: an authority that comes into the file of client_ca counts soon, and one that leaves it no more.
func TestNewAuthority(t *testing.T) {
	c := sharedTLS(t)
	file := c.plan.Certificate("").CA
	was, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	authority, pair := anotherAuthority(t)
	write := func(b []byte) {
		t.Helper()
		if err := errors.Join(os.WriteFile(file+".new", b, 0o644), os.Rename(file+".new", file)); err != nil {
			t.Fatal(err)
		}
	}
	answered := func() error {
		cfg := c.tls(t, "")
		cfg.Certificates = []tls.Certificate{pair}
		hc := &http.Client{Transport: &http.Transport{TLSClientConfig: cfg, DisableKeepAlives: true}, Timeout: 10 * time.Second}
		_, err := try(hc, "GET", c.Origins[0].URL, "/v2/", nil)
		return err
	}
	if answered() == nil {
		t.Fatal("an authority that nobody knows is believed")
	}
	defer write(was)
	write(append(bytes.Clone(was), authority...))
	eventually(t, 10*time.Second, answered)
	write(was)
	eventually(t, 10*time.Second, func() error {
		if answered() == nil {
			return errors.New("an authority that is in no file any more is believed")
		}
		return nil
	})
}

// anotherAuthority is the PEM of a new authority, and a client's certificate of it.
func anotherAuthority(t *testing.T) ([]byte, tls.Certificate) {
	t.Helper()
	issue := func(name string, parent *x509.Certificate, by *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{
			SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			IsCA: parent == nil, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}
		if parent == nil {
			parent, by = c, key
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), by)
		if err != nil {
			t.Fatal(err)
		}
		if c, err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		return c, key
	}
	ca, caKey := issue("another authority", nil, nil)
	leaf, key := issue("agent-01", ca, caKey)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw}), tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key}
}
