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
