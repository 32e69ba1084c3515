package login

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"kraken/proto/transport"
)

// people is an authority of certificates for people and machines.
type people struct {
	*testing.T
	cert *x509.Certificate
	key  crypto.Signer
}

func newPeople(t *testing.T) *people {
	p := &people{T: t}
	p.cert, p.key = p.sign(&x509.Certificate{Subject: pkix.Name{CommonName: "people"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return p
}

func (p *people) sign(c *x509.Certificate) (*x509.Certificate, crypto.Signer) {
	p.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		p.Fatal(err)
	}
	c.SerialNumber, c.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(time.Hour)
	parent, signer := p.cert, p.key
	if parent == nil {
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), signer)
	if err != nil {
		p.Fatal(err)
	}
	c, err = x509.ParseCertificate(der)
	if err != nil {
		p.Fatal(err)
	}
	return c, key
}

// client returns a client that shows a certificate for a subject, and for an identity where that is not empty.
func (p *people) client(subject pkix.Name, identity string) *tls.Certificate {
	p.Helper()
	c := &x509.Certificate{Subject: subject, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if identity != "" {
		u, err := url.Parse(identity)
		if err != nil {
			p.Fatal(err)
		}
		c.URIs = []*url.URL{u}
	}
	cert, key := p.sign(c)
	return &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
}

// files writes the authority, and a server's certificate with its key.
func (p *people) files() transport.TLS {
	p.Helper()
	dir := p.TempDir()
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			p.Fatal(err)
		}
		return path
	}
	cert, key := p.sign(&x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		p.Fatal(err)
	}
	return transport.TLS{
		Cert: write("server.crt", "CERTIFICATE", cert.Raw), Key: write("server.key", "PRIVATE KEY", der),
		ClientCA: write("people.crt", "CERTIFICATE", p.cert.Raw), ClientOptional: true,
	}
}

// TestCertificates has callers show certificates to a listener with client_optional, and nothing else.
func TestCertificates(t *testing.T) {
	r := newRigOf(t, `
rules:
  - {repositories: ["team/**"], subjects: ["cert:ann"], allow: [pull, push]}
  - {repositories: ["ops/**"], groups: ["cert:ops"], allow: [pull]}
  - {repositories: ["nodes/**"], subjects: ["node:node-1"], allow: [pull]}
`)
	r.door.cfg.Certificates = true
	ours, theirs := newPeople(t), newPeople(t)
	srv, err := transport.NewServer("server", transport.ServerConfig{Listen: "127.0.0.1:0", TLS: ours.files()}, r.h, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- srv.Run(ctx) }()
	defer func() {
		stop()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	}()
	const refusedByTLS = 0
	ann := ours.client(pkix.Name{CommonName: "ann"}, "")
	for _, c := range []struct {
		name          string
		shows         *tls.Certificate
		authorization string
		method, repo  string
		want          int
	}{
		{"nobody", nil, "", "GET", "team/a", 401},
		{"by its name", ann, "", "GET", "team/a", 200},
		{"may push", ann, "", "PUT", "team/a", 201},
		{"not elsewhere", ann, "", "GET", "ops/a", 403},
		{"not more than the rule says", ann, "", "DELETE", "team/a", 403},
		{"a password goes before a certificate", ann, basic("ann", "guess"), "GET", "team/a", 401},
		{"by its organization", ours.client(pkix.Name{CommonName: "bob", Organization: []string{"ops"}}, ""), "", "GET", "ops/a", 200},
		{"of another authority", theirs.client(pkix.Name{CommonName: "ann"}, ""), "", "GET", "team/a", refusedByTLS},
		{"without a name", ours.client(pkix.Name{Organization: []string{"ops"}}, ""), "", "GET", "ops/a", 401},
		{"a node", ours.client(pkix.Name{CommonName: "node-1"}, "kraken://test/agent/node-1"), "", "GET", "nodes/a", 200},
		{"a node that is called like a user", ours.client(pkix.Name{CommonName: "ann"}, "kraken://test/agent/node-2"), "", "GET", "team/a", 403},
	} {
		t.Run(c.name, func(t *testing.T) {
			roots := x509.NewCertPool()
			roots.AddCert(ours.cert)
			cfg := &tls.Config{RootCAs: roots}
			cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { // also to who does not trust it
				if c.shows == nil {
					return &tls.Certificate{}, nil
				}
				return c.shows, nil
			}
			tr := &http.Transport{TLSClientConfig: cfg}
			defer tr.CloseIdleConnections()
			q, err := http.NewRequestWithContext(t.Context(), c.method, srv.URL()+"/v2/"+c.repo+"/manifests/v1", http.NoBody)
			if err != nil {
				t.Fatal(err)
			}
			if c.authorization != "" {
				q.Header.Set("Authorization", c.authorization)
			}
			if c.method == "PUT" {
				q.Header.Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
			}
			resp, err := tr.RoundTrip(q)
			if err != nil {
				if c.want != refusedByTLS {
					t.Fatal(err)
				}
				return
			}
			defer resp.Body.Close()
			if resp.StatusCode != c.want {
				t.Errorf("%d, want %d", resp.StatusCode, c.want)
			}
		})
	}
}
