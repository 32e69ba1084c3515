package swarm

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"testing"
	"time"
)

// mutualTLS is both sides of a node that trusts only its own certificate.
func mutualTLS(t *testing.T) TLS {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "node"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	own := []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}
	return TLS{
		Server: &tls.Config{Certificates: own, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert},
		Client: &tls.Config{Certificates: own, RootCAs: pool, ServerName: "127.0.0.1"},
	}
}

func TestMutualTLSBetweenPeers(t *testing.T) {
	b := randomBytes(60, 4<<20)
	ours := mutualTLS(t)
	withTLS := func(c TLS) func(*Config) { return func(cfg *Config) { cfg.TLS = c } }
	seed, leech := newNode(t, withTLS(ours)), newNode(t, withTLS(ours))
	m := seed.seed(b)
	leech.fetch(m, nil, seed.peer()).finish()
	leech.has(b)
	for name, other := range map[string]func(*Config){"another certificate": withTLS(mutualTLS(t)), "no TLS": nil} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, other)
			d := n.fetch(m, nil, seed.peer())
			eventually(t, "dial is tried twice", func() bool {
				d.mu.Lock()
				defer d.mu.Unlock()
				return d.peers[seed.Addr()].tries > 1
			})
			if d.Stats().Peers != 0 || d.Left() != m.Size {
				t.Error("a node without our certificate was let in")
			}
			d.Close()
			d.part.Close()
		})
	}
}

func TestTLSExcludesStockPeers(t *testing.T) {
	n := newNode(t, nil)
	if s, err := New(Config{Listen: "127.0.0.1:0", Store: n.store, StockPeers: true, TLS: mutualTLS(t)}); err == nil {
		s.Close()
		t.Error("a contradiction was accepted")
	}
}
