package transport

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
)

// TLS names the files of a listener's identity. All are read again when they change.
type TLS struct {
	Cert string `yaml:"cert"` // PEM file
	Key  string `yaml:"key"`  // PEM file
	// ClientCA makes clients show a certificate of this authority (mutual TLS).
	ClientCA string `yaml:"client_ca"`
	// ClientOptional lets in who shows no certificate. One that is shown must be of ClientCA.
	ClientOptional bool `yaml:"client_optional"`
	// DeniedSerials is a file of serial numbers, hexadecimal, one a line: whoever shows such a certificate is refused,
	// and its connections are cut. It needs ClientCA.
	DeniedSerials string `yaml:"denied_serials"`

	every lookEvery // set by tests
}

// server returns the configuration of the listener, and the list of denied serial numbers. Both are nil when no
// certificate is configured.
func (t TLS) server(log *slog.Logger) (*tls.Config, *denied, error) {
	if t == (TLS{}) {
		return nil, nil, nil
	}
	if t.ClientOptional && t.ClientCA == "" {
		return nil, nil, errors.New("tls: client_optional needs client_ca: without it clients show no certificates")
	}
	if t.DeniedSerials != "" && t.ClientCA == "" {
		return nil, nil, errors.New("tls: denied_serials needs client_ca: without it clients show no certificates")
	}
	p, err := newPair(t.Cert, t.Key, t.every, log)
	if err != nil {
		return nil, nil, err
	}
	// HTTP/2 costs throughput and is not offered (proxy/DESIGN.md).
	c := &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}
	c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return p.get() }
	if t.ClientCA == "" {
		return c, nil, nil
	}
	if t.ClientOptional {
		c.ClientAuth = tls.VerifyClientCertIfGiven
	}
	d, err := verifyClients(c, t.ClientCA, t.DeniedSerials, anybody, t.every, log)
	return c, d, err
}

// PeerTLS names the files of a node's identity in the swarm: mutual TLS, both for connections that it accepts and ones
// that it dials. All are read again when they change.
type PeerTLS struct {
	Cert string `yaml:"cert"` // PEM file; its extended key usages are server and client
	Key  string `yaml:"key"`  // PEM file
	// CA is the PEM file of the authority that issues the cluster's nodes, and nobody else's: whoever has its
	// certificate may join.
	CA string `yaml:"ca"`
	// DeniedSerials is a file of serial numbers, hexadecimal, one a line: such certificates are refused, and
	// connections with them cut.
	DeniedSerials string `yaml:"denied_serials"`

	every lookEvery // set by tests
}

// PeerConfigs are both sides of PeerTLS.
type PeerConfigs struct {
	Server, Client *tls.Config
	Check          func(tls.ConnectionState) error // whether an open connection is still allowed
	Self           Principal                       // whom the node's own certificate names, zero for nobody
}

// Configs returns both sides; nothing is set, without an error, when nothing is configured. A peer is dialled by an
// address that another role announced and that changes with the node, so the authority alone vouches for it: names are
// not compared. admit, which may be nil, says whether the holder of a certificate that it vouches for may be a peer.
func (t PeerTLS) Configs(admit func(*x509.Certificate) error, log *slog.Logger) (PeerConfigs, error) {
	if t == (PeerTLS{}) {
		return PeerConfigs{}, nil
	}
	if t.CA == "" {
		return PeerConfigs{}, errors.New("tls: ca is needed to know the cluster's peers by")
	}
	if admit == nil {
		admit = anybody
	}
	p, err := newPair(t.Cert, t.Key, t.every, log)
	if err != nil {
		return PeerConfigs{}, err
	}
	server := &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return p.get() },
	}
	d, err := verifyClients(server, t.CA, t.DeniedSerials, admit, t.every, log)
	if err != nil {
		return PeerConfigs{}, err
	}
	roots, err := newPool(t.CA, t.every, log)
	if err != nil {
		return PeerConfigs{}, err
	}
	client := &tls.Config{
		MinVersion:           tls.VersionTLS13,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return p.get() },
		InsecureSkipVerify:   true, // the chain is verified below, without the name
		VerifyConnection: func(cs tls.ConnectionState) error {
			if err := errors.Join(verify(cs, roots, x509.ExtKeyUsageServerAuth), d.check(cs)); err != nil {
				return err
			}
			return admitted(admit, cs)
		},
	}
	own, err := p.get()
	if err != nil {
		return PeerConfigs{}, err
	}
	self, err := PrincipalOf(own.Leaf)
	if err != nil && !errors.Is(err, ErrNoIdentity) {
		return PeerConfigs{}, err
	}
	return PeerConfigs{server, client, d.check, self}, nil
}

// admitted asks admit for the other side of a connection.
func admitted(admit func(*x509.Certificate) error, cs tls.ConnectionState) error {
	if err := admit(cs.PeerCertificates[0]); err != nil {
		return fmt.Errorf("%w: %w", errNotAdmitted, err)
	}
	return nil
}

// anybody admits whoever the authority vouches for.
func anybody(*x509.Certificate) error { return nil }

// verifyClients makes c ask for certificates of the authority in the file ca that are not on the list in the file
// serials, as both files are when a client comes, and whose holders are admitted. A resumed session is verified again.
func verifyClients(c *tls.Config, ca, serials string, admit func(*x509.Certificate) error, every lookEvery, log *slog.Logger) (*denied, error) {
	roots, err := newPool(ca, every, log)
	if err != nil {
		return nil, err
	}
	d, err := newDenied(serials, every, log)
	if err != nil {
		return nil, err
	}
	if c.ClientAuth == tls.NoClientCert {
		c.ClientAuth = tls.RequireAndVerifyClientCert
	}
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		if c.ClientAuth == tls.VerifyClientCertIfGiven && len(cs.PeerCertificates) == 0 {
			return nil
		}
		if cs.DidResume {
			if err := verify(cs, roots, x509.ExtKeyUsageClientAuth); err != nil {
				return err
			}
		}
		if err := d.check(cs); err != nil {
			return err
		}
		return admitted(admit, cs)
	}
	base := c.Clone()
	c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		pool, err := roots.get()
		now := base.Clone()
		now.ClientCAs = pool
		return now, err
	}
	return d, nil
}

var errNoCertificate = errors.New("tls: the other side shows no certificate")

// verify checks the chain that the other side showed against the authority as its file is now. Names are not compared.
func verify(cs tls.ConnectionState, ca *reloaded[*x509.CertPool], usage x509.ExtKeyUsage) error {
	roots, err := ca.get()
	if err != nil {
		return err
	}
	if len(cs.PeerCertificates) == 0 {
		return errNoCertificate
	}
	opts := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{usage}}
	for _, c := range cs.PeerCertificates[1:] {
		opts.Intermediates.AddCert(c)
	}
	_, err = cs.PeerCertificates[0].Verify(opts)
	return err
}

// denied is a list of serial numbers in a file. A nil one denies nothing.
type denied struct{ list *reloaded[map[string]bool] }

// newDenied reads the file; none is nil without an error.
func newDenied(file string, every lookEvery, log *slog.Logger) (*denied, error) {
	if file == "" {
		return nil, nil
	}
	list, err := newReloaded(log, every, parseSerials, file)
	return &denied{list}, err
}

// ErrDenied is a certificate whose serial number is on the list.
var ErrDenied = errors.New("tls: the certificate's serial number is denied")

// check looks for the certificates that the other side showed.
func (d *denied) check(cs tls.ConnectionState) error {
	if d == nil {
		return nil
	}
	list, err := d.list.get()
	if err != nil {
		return err
	}
	for _, c := range cs.PeerCertificates {
		if list[c.SerialNumber.Text(16)] {
			return fmt.Errorf("%w: %s", ErrDenied, c.SerialNumber.Text(16))
		}
	}
	return nil
}
