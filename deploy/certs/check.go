package certs

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"kraken/proto/transport"
)

// Want is what certificates are checked against. What is empty is not looked at.
type Want struct {
	CA      string // file of the authorities that the cluster trusts
	Cluster string
	Role    transport.Role
	Host    string        // that clients reach the holder at
	Key     string        // file, default the certificate's name with .key, where that is there
	Within  time.Duration // a certificate that ends sooner is wrong
}

// Check returns what is wrong with a certificate's file, each fault as it can be mended, and what the certificate says.
// An error is a file that can't be read.
func Check(file string, want Want, now time.Time) (faults []string, says string, err error) {
	certs, err := readCertificates(file)
	if err != nil {
		return nil, "", err
	}
	c := certs[0]
	var f faultList
	p, err := transport.PrincipalOf(c)
	switch {
	case c.IsCA:
		says = "authority " + c.Subject.CommonName
	case err != nil:
		f.add("%v", err)
		says = c.Subject.String()
	default:
		says = p.String()
		f.identity(p, c, want)
	}
	says += ", until " + c.NotAfter.UTC().Format("2006-01-02 15:04 UTC")
	f.time(c, want.Within, now)
	if !c.IsCA {
		f.usage(p, c)
		if want.Host != "" {
			if err := c.VerifyHostname(want.Host); err != nil {
				f.add("clients that call it %s refuse it: %v", want.Host, err)
			}
		}
		if err := f.chain(certs, want.CA, now); err != nil {
			return nil, says, err
		}
		f.key(file, want.Key)
	}
	return f, says, nil
}

type faultList []string

func (f *faultList) add(format string, args ...any) { *f = append(*f, fmt.Sprintf(format, args...)) }

// identity compares whom a certificate names with whom it should.
func (f *faultList) identity(p transport.Principal, c *x509.Certificate, want Want) {
	if !slices.Contains(transport.Roles, p.Role) {
		f.add("it names the role %s, which may do nothing: want one of %s", p.Role, roleNames())
	}
	if want.Cluster != "" && p.Cluster != want.Cluster {
		f.add("it is of the cluster %s, not %s", p.Cluster, want.Cluster)
	}
	if want.Role != "" && p.Role != want.Role {
		f.add("it names the role %s, not %s", p.Role, want.Role)
	}
	if slices.Contains(needHosts, p.Role) && len(c.DNSNames) == 0 && len(c.IPAddresses) == 0 {
		f.add("it names no host: clients of its listener refuse it, whatever name they call it by")
	}
}

func (f *faultList) time(c *x509.Certificate, within time.Duration, now time.Time) {
	switch {
	case now.After(c.NotAfter):
		f.add("it has expired %s ago", now.Sub(c.NotAfter).Round(time.Minute))
	case now.Before(c.NotBefore):
		f.add("it is not valid for another %s: is this machine's clock right?", c.NotBefore.Sub(now).Round(time.Second))
	case c.NotAfter.Sub(now) < within:
		f.add("it expires in %s", c.NotAfter.Sub(now).Round(time.Minute))
	}
}

// usage looks for what each side of a connection wants of the other's certificate.
func (f *faultList) usage(p transport.Principal, c *x509.Certificate) {
	has := func(u x509.ExtKeyUsage) bool {
		return slices.Contains(c.ExtKeyUsage, u) || slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny) || len(c.ExtKeyUsage) == 0 && len(c.UnknownExtKeyUsage) == 0
	}
	if !has(x509.ExtKeyUsageClientAuth) {
		f.add("it is not for clients (extended key usage clientAuth): others refuse it where this node asks them")
	}
	if !has(x509.ExtKeyUsageServerAuth) && !slices.Contains(askers, p.Role) {
		f.add("it is not for servers (extended key usage serverAuth): others refuse it at this node's listeners")
	}
}

// chain verifies a certificate, and what stands after it in its file, by the authorities in a file.
func (f *faultList) chain(certs []*x509.Certificate, ca string, now time.Time) error {
	if ca == "" {
		return nil
	}
	roots, err := readCertificates(ca)
	if err != nil {
		return err
	}
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	for _, r := range roots {
		opts.Roots.AddCert(r)
	}
	for _, c := range certs[1:] {
		opts.Intermediates.AddCert(c)
	}
	// Its own time was looked at; what is left are the authority and its time.
	opts.CurrentTime = now
	if c := certs[0]; now.After(c.NotAfter) || now.Before(c.NotBefore) {
		opts.CurrentTime = c.NotBefore.Add(c.NotAfter.Sub(c.NotBefore) / 2)
	}
	if _, err := certs[0].Verify(opts); err != nil {
		f.add("no authority in %s vouches for it: %v", ca, err)
	}
	return nil
}

// key looks at the file of a certificate's key: that it belongs to it, and who may read it.
func (f *faultList) key(cert, key string) {
	if key == "" {
		if key = strings.TrimSuffix(cert, filepath.Ext(cert)) + ".key"; !exists(key) {
			return
		}
	}
	switch i, err := os.Stat(key); {
	case err != nil:
		f.add("its key can't be looked at: %v", err)
		return
	case i.Mode().Perm()&0o077 != 0:
		f.add("its key, %s, may be read by others (mode %o): chmod 600", key, i.Mode().Perm())
	}
	if _, err := tls.LoadX509KeyPair(cert, key); err != nil {
		f.add("its key, %s, is not its own: %v", key, err)
	}
}

// errFaults is that certificates are not as they should be; what is wrong was printed.
var errFaults = errors.New("not all certificates are as they should be")
