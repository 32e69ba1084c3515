package devcluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"kraken/proto/transport"
)

// Files of a certificate that a cluster with mutual TLS gave out, all PEM.
type Files struct {
	CA, Cert, Key string
}

// Certificate names the files of whom the cluster's authority certified by that id: every component's, and who Issue
// was called for.
func (cl *Cluster) Certificate(id string) Files {
	dir := filepath.Join(cl.Dir, "tls")
	return Files{CA: filepath.Join(dir, "ca.pem"), Cert: filepath.Join(dir, id+".pem"), Key: filepath.Join(dir, id+".key")}
}

// writeCertificates makes an authority and a certificate for each component.
func (cl *Cluster) writeCertificates() error {
	if err := os.MkdirAll(filepath.Join(cl.Dir, "tls"), 0o700); err != nil {
		return err
	}
	ca := &x509.Certificate{
		Subject: pkix.Name{CommonName: "kraken development cluster"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	f := cl.Certificate("authority")
	if err := sign(ca, nil, nil, f.CA, f.Key); err != nil {
		return err
	}
	for _, c := range cl.Components {
		if _, err := cl.Issue(c.ID()); err != nil {
			return err
		}
	}
	return nil
}

// ClusterName is what the certificates of a development cluster name as their cluster.
const ClusterName = "dev"

// Issue gives id a certificate of the cluster's authority, for servers and clients, in its common name and DNS names.
// An id such as agent-01 also names a role, which the certificate's identity has. Up must have been called.
func (cl *Cluster) Issue(id string) (Files, error) {
	authority := cl.Certificate("authority")
	ca, key, err := readAuthority(authority.CA, authority.Key)
	if err != nil {
		return Files{}, fmt.Errorf("certificate of %s: %w", id, err)
	}
	c := &x509.Certificate{
		Subject: pkix.Name{CommonName: id}, DNSNames: []string{id, "localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if p, ok := principal(id); ok {
		c.URIs = []*url.URL{{Scheme: "kraken", Host: p.Cluster, Path: "/" + string(p.Role) + "/" + p.ID}}
	}
	f := cl.Certificate(id)
	return f, sign(c, ca, key, f.Cert, f.Key)
}

// principal returns whom the certificate of an id names: the role is what stands before the last dash.
func principal(id string) (transport.Principal, bool) {
	role := id
	if i := strings.LastIndexByte(id, '-'); i > 0 && strings.Trim(id[i+1:], "0123456789") == "" {
		role = id[:i]
	}
	if !slices.Contains(transport.Roles, transport.Role(role)) {
		return transport.Principal{}, false
	}
	return transport.Principal{Cluster: ClusterName, Role: transport.Role(role), ID: id}, true
}

// sign makes a key for c, has c signed by the authority, or by itself without one, and writes both.
func sign(c, ca *x509.Certificate, caKey *ecdsa.PrivateKey, certFile, keyFile string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	if ca == nil {
		ca, caKey = c, key
	}
	if c.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)); err != nil {
		return err
	}
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().AddDate(1, 0, 0)
	der, err := x509.CreateCertificate(rand.Reader, c, ca, key.Public(), caKey)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644),
		os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600),
	)
}

func readAuthority(certFile, keyFile string) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	cert, err := readPEM(certFile)
	if err != nil {
		return nil, nil, err
	}
	ca, err := x509.ParseCertificate(cert)
	if err != nil {
		return nil, nil, err
	}
	der, err := readPEM(keyFile)
	if err != nil {
		return nil, nil, err
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, nil, err
	}
	k, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, nil, fmt.Errorf("%s: want an ECDSA key", keyFile)
	}
	return ca, k, nil
}

func readPEM(file string) ([]byte, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	p, _ := pem.Decode(b)
	if p == nil {
		return nil, fmt.Errorf("%s: not PEM", file)
	}
	return p.Bytes, nil
}
