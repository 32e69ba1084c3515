// Package certs is a small certificate authority for clusters that have none: it makes the authority, issues and renews
// the certificates of nodes and operators, whose identities they name, and says what is wrong with certificates,
// whoever issued them. Its files are PEM, in one folder that is kept where certificates are handed out, not on nodes.
package certs

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"time"

	"kraken/proto/transport"
)

// Files of an authority, in its folder: all certificates that nodes are to trust, and the key that signs. While one
// authority takes the place of another, the next one's key is there too.
const (
	AuthorityFile = "ca.pem"
	keyFile       = "ca.key"
	nextKeyFile   = "ca-next.key"
)

// Lives of certificates where no other is asked for.
const (
	AuthorityLife   = 10 * 365 * 24 * time.Hour
	CertificateLife = 90 * 24 * time.Hour
)

// backdate makes new certificates valid on machines whose clocks are behind.
const backdate = 5 * time.Minute

// Authority signs certificates of one cluster.
type Authority struct {
	Dir     string
	Cluster string
	bundle  []*x509.Certificate // as in AuthorityFile; the one that signs is first
	key     *ecdsa.PrivateKey
}

// Init makes an authority in a folder that has none.
func Init(dir, cluster string, life time.Duration) (*Authority, error) {
	if _, err := transport.ParsePrincipal(transport.Principal{Cluster: cluster, Role: transport.RoleOperator, ID: "x"}.String()); err != nil {
		return nil, fmt.Errorf("cluster %q: want 1 to 63 of a-z, 0-9, dot and dash, which begin and end with a letter or digit", cluster)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	for _, f := range []string{AuthorityFile, keyFile} {
		if _, err := os.Stat(filepath.Join(dir, f)); !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%s is there already: an authority is made once, all that it signed ends with it", filepath.Join(dir, f))
		}
	}
	cert, key, err := newAuthority(cluster, life)
	if err != nil {
		return nil, err
	}
	a := &Authority{Dir: dir, Cluster: cluster, bundle: []*x509.Certificate{cert}, key: key}
	if err := writeKey(filepath.Join(dir, keyFile), key); err != nil {
		return nil, err
	}
	return a, a.writeBundle()
}

func newAuthority(cluster string, life time.Duration) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	now := time.Now()
	t := &x509.Certificate{
		Subject:   pkix.Name{CommonName: "Kraken authority of " + cluster + ", " + now.UTC().Format(time.DateOnly), Organization: []string{cluster}},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(life),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	cert, err := create(t, t, key, key)
	return cert, key, err
}

// create signs a template with a new serial number.
func create(t, parent *x509.Certificate, key, signer *ecdsa.PrivateKey) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	t.SerialNumber = serial
	der, err := x509.CreateCertificate(rand.Reader, t, parent, key.Public(), signer)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// Open reads the authority in a folder.
func Open(dir string) (*Authority, error) {
	bundle, err := readCertificates(filepath.Join(dir, AuthorityFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s holds no authority: kraken certs init makes one", dir)
	}
	if err != nil {
		return nil, err
	}
	key, err := readKey(filepath.Join(dir, keyFile))
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(bundle, func(c *x509.Certificate) bool { return key.PublicKey.Equal(c.PublicKey) })
	if i < 0 || len(bundle[i].Subject.Organization) != 1 {
		return nil, fmt.Errorf("%s holds no authority of %s", filepath.Join(dir, AuthorityFile), filepath.Join(dir, keyFile))
	}
	bundle[0], bundle[i] = bundle[i], bundle[0]
	return &Authority{Dir: dir, Cluster: bundle[0].Subject.Organization[0], bundle: bundle, key: key}, nil
}

// The three steps of putting another authority in the place of this one, with the files handed to all nodes after each:
// Next makes nodes trust both, Switch signs with the next one from then on (every certificate is then renewed), Drop
// ends the trust in the old one.

// Next makes the authority that will follow this one, and has both trusted.
func (a *Authority) Next(life time.Duration) error {
	if len(a.bundle) > 1 {
		return fmt.Errorf("%s holds %d authorities already: switch and drop come before another next", filepath.Join(a.Dir, AuthorityFile), len(a.bundle))
	}
	cert, key, err := newAuthority(a.Cluster, life)
	if err != nil {
		return err
	}
	if err := writeKey(filepath.Join(a.Dir, nextKeyFile), key); err != nil {
		return err
	}
	a.bundle = append(a.bundle, cert)
	return a.writeBundle()
}

// Switch signs with the next authority from now on; both stay trusted.
func (a *Authority) Switch() error {
	next := filepath.Join(a.Dir, nextKeyFile)
	key, err := readKey(next)
	if errors.Is(err, fs.ErrNotExist) {
		return errors.New("there is no next authority: next makes one")
	}
	if err != nil {
		return err
	}
	i := slices.IndexFunc(a.bundle, func(c *x509.Certificate) bool { return key.PublicKey.Equal(c.PublicKey) })
	if i < 0 {
		return fmt.Errorf("%s has no certificate of the next authority", filepath.Join(a.Dir, AuthorityFile))
	}
	if err := os.Rename(next, filepath.Join(a.Dir, keyFile)); err != nil {
		return err
	}
	a.key = key
	a.bundle[0], a.bundle[i] = a.bundle[i], a.bundle[0]
	return a.writeBundle()
}

// Drop has this authority alone trusted. It refuses while certificates in the folder are another one's.
func (a *Authority) Drop() error {
	issued, err := a.Issued()
	if err != nil {
		return err
	}
	var errs []error
	for _, i := range issued {
		if i.Cert.CheckSignatureFrom(a.bundle[0]) != nil {
			errs = append(errs, fmt.Errorf("%s is of another authority still: renew --all comes first", i.File))
		}
	}
	if _, err := os.Stat(filepath.Join(a.Dir, nextKeyFile)); err == nil {
		errs = append(errs, errors.New("the next authority does not sign yet: switch comes first"))
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	a.bundle = a.bundle[:1]
	return a.writeBundle()
}

func (a *Authority) writeBundle() error {
	var b bytes.Buffer
	for _, c := range a.bundle {
		if err := pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}); err != nil {
			return err
		}
	}
	return replace(filepath.Join(a.Dir, AuthorityFile), b.Bytes(), 0o644)
}

// replace writes a file beside its name and gives it the name: who reads it sees the old one or the new one.
func replace(file string, content []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(file), ".new-*") // 0600
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", file, err), os.Remove(f.Name()))
	}
	return nil
}

func writeKey(file string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return replace(file, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

func readKey(file string) (*ecdsa.PrivateKey, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("%s: holds no key in PEM form", file)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	k, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s: want an ECDSA key, as kraken certs makes them", file)
	}
	return k, nil
}

// readCertificates returns all certificates of a PEM file, at least one.
func readCertificates(file string) (out []*x509.Certificate, err error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s: holds no certificate in PEM form", file)
	}
	return out, nil
}
