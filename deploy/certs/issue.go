package certs

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"kraken/proto/transport"
)

// Request is what a certificate is to say.
type Request struct {
	Role transport.Role
	ID   string
	// Hosts are the DNS names and addresses that others reach the holder at. Roles with listeners that others dial by
	// name need at least one.
	Hosts []string
	Life  time.Duration
}

// Issued is a certificate of a folder, with the files of it and of its key.
type Issued struct {
	File, KeyFile string
	Cert          *x509.Certificate
}

// needHosts are the roles whose listeners clients of HTTPS dial.
var needHosts = []transport.Role{transport.RoleProxy, transport.RoleOrigin, transport.RoleBuildIndex, transport.RoleTracker}

// askers are the roles without listeners.
var askers = []transport.Role{transport.RoleOperator, transport.RoleMonitor, transport.RoleClient}

// files are where a certificate of the folder is: <role>/<id>.
func (a *Authority) files(p transport.Principal) Issued {
	base := filepath.Join(a.Dir, string(p.Role), p.ID)
	return Issued{File: base + ".pem", KeyFile: base + ".key"}
}

// Issue makes a key and a certificate for it. What is there of the same role and id is replaced.
func (a *Authority) Issue(r Request) (Issued, error) {
	p := transport.Principal{Cluster: a.Cluster, Role: r.Role, ID: r.ID}
	if _, err := transport.ParsePrincipal(p.String()); err != nil {
		return Issued{}, err
	}
	if !slices.Contains(transport.Roles, r.Role) {
		return Issued{}, fmt.Errorf("role %q: want one of %s", r.Role, roleNames())
	}
	if len(r.Hosts) == 0 && slices.Contains(needHosts, r.Role) {
		return Issued{}, fmt.Errorf("%s %s: at least one host is needed, a DNS name or an address that others reach it at", r.Role, r.ID)
	}
	t := &x509.Certificate{
		Subject:     pkix.Name{CommonName: p.ID},
		URIs:        []*url.URL{{Scheme: "kraken", Host: p.Cluster, Path: "/" + string(p.Role) + "/" + p.ID}},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if !slices.Contains(askers, r.Role) {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	for _, h := range r.Hosts {
		switch ip := net.ParseIP(h); {
		case ip != nil:
			t.IPAddresses = append(t.IPAddresses, ip)
		case h == "" || strings.ContainsAny(h, " /:@*"):
			return Issued{}, fmt.Errorf("host %q: want a DNS name or an address, without port", h)
		default:
			t.DNSNames = append(t.DNSNames, h)
		}
	}
	return a.sign(t, p, r.Life)
}

func roleNames() string {
	var names []string
	for _, r := range transport.Roles {
		names = append(names, string(r))
	}
	return strings.Join(names, ", ")
}

// sign makes a key, completes the template and writes both. A reader that meets the new key beside the old certificate
// keeps what it had, and looks again.
func (a *Authority) sign(t *x509.Certificate, p transport.Principal, life time.Duration) (Issued, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Issued{}, err
	}
	t.NotBefore, t.NotAfter = time.Now().Add(-backdate), time.Now().Add(life)
	if end := a.bundle[0].NotAfter; t.NotAfter.After(end) {
		t.NotAfter = end
	}
	cert, err := create(t, a.bundle[0], key, a.key)
	if err != nil {
		return Issued{}, err
	}
	out := a.files(p)
	out.Cert = cert
	if err := os.MkdirAll(filepath.Dir(out.File), 0o700); err != nil {
		return Issued{}, err
	}
	if err := writeKey(out.KeyFile, key); err != nil {
		return Issued{}, err
	}
	return out, replace(out.File, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o644)
}

// Issued returns the certificates in the folder, by role and id.
func (a *Authority) Issued() (out []Issued, err error) {
	for _, role := range transport.Roles {
		files, err := filepath.Glob(filepath.Join(a.Dir, string(role), "*.pem"))
		if err != nil {
			return nil, err
		}
		for _, f := range files {
			certs, err := readCertificates(f)
			if err != nil {
				return nil, err
			}
			out = append(out, Issued{File: f, KeyFile: strings.TrimSuffix(f, ".pem") + ".key", Cert: certs[0]})
		}
	}
	return out, nil
}

// Renew makes new keys and certificates, with the same names and for the same time as before, for those in the folder
// that end within a time from now; within 0 means a third of each one's own life, all means every one.
func (a *Authority) Renew(within time.Duration, all bool) (renewed []Issued, err error) {
	issued, err := a.Issued()
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, i := range issued {
		life := i.Cert.NotAfter.Sub(i.Cert.NotBefore) - backdate
		ahead := within
		if ahead == 0 {
			ahead = life / 3
		}
		if !all && time.Until(i.Cert.NotAfter) > ahead {
			continue
		}
		p, err := transport.PrincipalOf(i.Cert)
		if err == nil && (p.Cluster != a.Cluster || a.files(p).File != i.File) {
			err = fmt.Errorf("it is of %s", p)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s is not renewed: %w", i.File, err))
			continue
		}
		old := i.Cert
		t := &x509.Certificate{
			Subject: pkix.Name{CommonName: p.ID}, URIs: old.URIs, DNSNames: old.DNSNames, IPAddresses: old.IPAddresses,
			KeyUsage: old.KeyUsage, ExtKeyUsage: old.ExtKeyUsage,
		}
		n, err := a.sign(t, p, life)
		if err != nil {
			errs = append(errs, fmt.Errorf("renew %s: %w", i.File, err))
			continue
		}
		renewed = append(renewed, n)
	}
	return renewed, errors.Join(errs...)
}

// exists reports whether a file is there.
func exists(file string) bool {
	_, err := os.Stat(file)
	return !errors.Is(err, fs.ErrNotExist)
}
