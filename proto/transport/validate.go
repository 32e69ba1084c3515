package transport

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kraken/proto/config"
)

// Validate puts what is wrong into m, under key, and replaces an interface's name in Advertise by its address. It reads
// the files that TLS names, and binds nothing.
func (c *ServerConfig) Validate(m *config.Mistakes, key string) {
	m.Listen(key+".listen", c.Listen)
	for i, h := range c.Hosts {
		if h == "" || strings.ContainsAny(h, "/ ") {
			m.Add(fmt.Sprintf("%s.hosts[%d]", key, i), "%q is no name of a host: want one as a Host header has it, or * for every name", h)
		}
	}
	c.Advertise = resolveServer(m, key+".advertise", c.Advertise)
	c.TLS.validate(m, key+".tls")
	config.NotNegative(m, key+".drain_timeout", c.DrainTimeout)
	if err := tryCongestion(c.CongestionControl); err != nil {
		m.Add(key+".congestion_control", "%w", err)
	}
}

// Validate puts what is wrong into m, under key. It reads the files that are named.
func (c *ClientConfig) Validate(m *config.Mistakes, key string) {
	if c.CA != "" {
		validCA(m, key+".ca", c.CA)
	}
	validPair(m, key, c.Cert, c.Key)
	validSerials(m, key, c.DeniedSerials)
	config.NotNegative(m, key+".dial_timeout", c.DialTimeout)
	config.NotNegative(m, key+".progress_timeout", c.ProgressTimeout)
}

func (t TLS) validate(m *config.Mistakes, key string) {
	if t.DeniedSerials != "" && t.ClientCA == "" {
		m.Add(key+".denied_serials", "needs client_ca: without it clients show no certificates")
	}
	if t.ClientOptional && t.ClientCA == "" {
		m.Add(key+".client_optional", "needs client_ca: without it clients show no certificates")
	}
	if t.ClientCA != "" {
		validCA(m, key+".client_ca", t.ClientCA)
		if t.Cert == "" && t.Key == "" {
			m.Add(key+".cert", "is needed with client_ca, and key: without them the listener would be plain HTTP")
		}
	}
	validPair(m, key, t.Cert, t.Key)
	validSerials(m, key, t.DeniedSerials)
}

// Validate puts what is wrong into m, under key. It reads the files that are named.
func (t PeerTLS) Validate(m *config.Mistakes, key string) {
	if t == (PeerTLS{}) {
		return
	}
	if t.CA == "" {
		m.Add(key+".ca", "is needed, to know the cluster's peers by")
	} else {
		validCA(m, key+".ca", t.CA)
	}
	if t.Cert == "" && t.Key == "" {
		m.Add(key+".cert", "is needed with ca, and key")
	}
	validPair(m, key, t.Cert, t.Key)
	validSerials(m, key, t.DeniedSerials)
}

// validSerials refuses a list that can't be read.
func validSerials(m *config.Mistakes, key, path string) {
	if path == "" {
		return
	}
	b, err := os.ReadFile(path)
	if err == nil {
		_, err = parseSerials([][]byte{b})
	}
	if err != nil {
		m.Add(key+".denied_serials", "%w", err)
	}
}

// validCA refuses a file that can't be read or holds no certificate.
func validCA(m *config.Mistakes, key, path string) {
	b, err := os.ReadFile(path)
	if err != nil {
		m.Add(key, "%w", err)
		return
	}
	certs := certificatesOf(b)
	if len(certs) == 0 {
		m.Add(key, "%s holds no certificate: want a PEM file with a block that begins with -----BEGIN CERTIFICATE-----", path)
		return
	}
	var errs []error
	for _, c := range certs {
		if err := validTime(c, time.Now()); err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) == len(certs) { // of several, as while one takes the place of another, one will do
		m.Add(key, "%s %w", path, errs[0])
	}
}

// certificatesOf returns the certificates of a PEM file that can be parsed, as x509.CertPool takes them.
func certificatesOf(b []byte) (out []*x509.Certificate) {
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" || len(block.Headers) != 0 {
			continue
		}
		if c, err := x509.ParseCertificate(block.Bytes); err == nil {
			out = append(out, c)
		}
	}
	return out
}

// validPair refuses a certificate without a key, the other way round, and two that don't belong together. Both empty is
// nothing.
func validPair(m *config.Mistakes, under, cert, key string) {
	switch {
	case cert == "" && key == "":
		return
	case cert == "":
		m.Add(under+".cert", "is needed with key")
	case key == "":
		m.Add(under+".key", "is needed with cert")
	}
	certPEM := validPEM(m, under+".cert", cert, "CERTIFICATE")
	keyPEM := validPEM(m, under+".key", key, "PRIVATE KEY")
	if certPEM == nil || keyPEM == nil {
		return
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		m.Add(under+".key", "%s and the certificate %s do not belong together: %w", key, cert, err)
		return
	}
	if err := validTime(pair.Leaf, time.Now()); err != nil {
		m.Add(under+".cert", "%s %w", cert, err)
	}
}

// validTime returns an error for a certificate that others refuse because of its dates.
func validTime(c *x509.Certificate, now time.Time) error {
	switch {
	case now.After(c.NotAfter):
		return fmt.Errorf("expired at %s, %s ago: others refuse it", c.NotAfter.UTC().Format(time.RFC3339), now.Sub(c.NotAfter).Round(time.Minute))
	case now.Before(c.NotBefore):
		return fmt.Errorf("is not valid before %s: others refuse it; is this machine's clock right?", c.NotBefore.UTC().Format(time.RFC3339))
	}
	return nil
}

// validPEM is the content of a file that has a block of a kind; nil when it has none, or path is empty.
func validPEM(m *config.Mistakes, key, path, kind string) []byte {
	if path == "" {
		return nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		m.Add(key, "%w", err)
		return nil
	}
	for rest := b; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			m.Add(key, "%s holds no %s: want a PEM file with a block that begins with -----BEGIN %s-----", path, strings.ToLower(kind), kind)
			return nil
		}
		if strings.HasSuffix(block.Type, kind) {
			return b
		}
	}
}

// tryCongestion sets a congestion control on a socket that is then thrown away.
func tryCongestion(choice string) error {
	lc := listenConfig(choice)
	if lc.Control == nil {
		return nil
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil // the listener will tell
	}
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	var raw syscall.RawConn
	if raw, err = f.SyscallConn(); err != nil {
		return nil
	}
	return lc.Control("tcp", "", raw)
}
