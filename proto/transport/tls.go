package transport

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

// TLS names the files of a listener's identity. The certificate and the key are read again when they change.
type TLS struct {
	Cert string `yaml:"cert"` // PEM file
	Key  string `yaml:"key"`  // PEM file
	// ClientCA makes clients show a certificate of this authority (mutual TLS).
	ClientCA string `yaml:"client_ca"`
}

// server is nil when no certificate is configured.
func (t TLS) server() (*tls.Config, error) {
	if t == (TLS{}) {
		return nil, nil
	}
	p, err := newPair(t.Cert, t.Key)
	if err != nil {
		return nil, err
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}
	c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return p.get() }
	if t.ClientCA != "" {
		if c.ClientCAs, err = pool(t.ClientCA); err != nil {
			return nil, err
		}
		c.ClientAuth = tls.RequireAndVerifyClientCert
	}
	return c, nil
}

// PeerTLS names the files of a node's identity in the swarm: mutual TLS, both for connections that it accepts and ones that it dials.
type PeerTLS struct {
	Cert string `yaml:"cert"` // PEM file; its extended key usages are server and client
	Key  string `yaml:"key"`  // PEM file
	// CA is the PEM file of the authority that issues the cluster's nodes, and nobody else's: whoever has its certificate may join.
	CA string `yaml:"ca"`
}

// Configs are both sides; nil without an error when nothing is configured. A peer is dialled by an address that another role announced
// and that changes with the node, so the authority alone vouches for it: names are not compared.
func (t PeerTLS) Configs() (server, client *tls.Config, err error) {
	if t == (PeerTLS{}) {
		return nil, nil, nil
	}
	if t.CA == "" {
		return nil, nil, errors.New("tls: ca is needed to know the cluster's peers by")
	}
	p, err := newPair(t.Cert, t.Key)
	if err != nil {
		return nil, nil, err
	}
	roots, err := pool(t.CA)
	if err != nil {
		return nil, nil, err
	}
	server = &tls.Config{
		MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: roots,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return p.get() },
	}
	client = &tls.Config{
		MinVersion:           tls.VersionTLS13,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return p.get() },
		InsecureSkipVerify:   true, // the chain is verified below, without the name
		VerifyConnection: func(cs tls.ConnectionState) error {
			opts := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool()}
			for _, c := range cs.PeerCertificates[1:] {
				opts.Intermediates.AddCert(c)
			}
			_, err := cs.PeerCertificates[0].Verify(opts)
			return err
		},
	}
	return server, client, nil
}

func pool(path string) (*x509.CertPool, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("certificate authority: %w", err)
	}
	p := x509.NewCertPool()
	if !p.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("certificate authority: %s has no PEM certificate", path)
	}
	return p, nil
}

// pair is a certificate and key on disk.
type pair struct {
	cert, key string

	mu      sync.Mutex
	current *tls.Certificate
	stamp   [2]time.Time
	checked time.Time
}

func newPair(cert, key string) (*pair, error) {
	if cert == "" || key == "" {
		return nil, errors.New("tls: cert and key are needed together")
	}
	p := &pair{cert: cert, key: key}
	_, err := p.get()
	return p, err
}

// get looks at the files at most once a second. While a new pair is half written the old one is used.
func (p *pair) get() (*tls.Certificate, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if p.current != nil && now.Sub(p.checked) < time.Second {
		return p.current, nil
	}
	p.checked = now
	var stamp [2]time.Time
	for i, f := range []string{p.cert, p.key} {
		if fi, err := os.Stat(f); err == nil {
			stamp[i] = fi.ModTime()
		}
	}
	if p.current != nil && stamp == p.stamp {
		return p.current, nil
	}
	c, err := tls.LoadX509KeyPair(p.cert, p.key)
	if err != nil {
		if p.current != nil {
			return p.current, nil
		}
		return nil, fmt.Errorf("tls: %w", err)
	}
	p.current, p.stamp = &c, stamp
	return p.current, nil
}
