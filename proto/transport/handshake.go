package transport

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"strings"
)

// Why a TLS handshake failed, as metrics and logs say it.
const (
	HandshakeExpired   = "expired"   // a certificate's time is over, or has not come
	HandshakeAuthority = "authority" // no authority that is trusted vouches for a certificate
	HandshakeMissing   = "missing"   // no certificate was shown
	HandshakePlain     = "plain"     // the other side does not speak TLS
	HandshakeDenied    = "denied"    // the certificate's serial number is on the list
	HandshakeIdentity  = "identity"  // the certificate names nobody who may come
	HandshakeRefused   = "refused"   // the other side does not accept our certificate, and does not say why
	HandshakeOther     = "other"
)

// HandshakeReasons are all of them.
var HandshakeReasons = []string{
	HandshakeExpired, HandshakeAuthority, HandshakeMissing, HandshakePlain, HandshakeDenied, HandshakeIdentity, HandshakeRefused, HandshakeOther,
}

// errNotAdmitted is a certificate that an authority vouches for, and whose holder may not come.
var errNotAdmitted = errors.New("tls: the certificate's holder is not admitted")

// HandshakeFailure returns why a TLS handshake failed with err, and whether it was the other side that refused ours.
// reason is empty where the connection just ended: nobody refused anybody.
func HandshakeFailure(err error) (reason string, byThem bool) {
	var op *net.OpError
	var record tls.RecordHeaderError
	var invalid x509.CertificateInvalidError
	var authority x509.UnknownAuthorityError
	switch {
	case err == nil:
		return "", false
	case errors.As(err, &op) && op.Op == "remote error": // an alert, whose type crypto/tls keeps to itself
		return alertReason(op.Err.Error()), true
	case errors.As(err, &record):
		return HandshakePlain, false
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return HandshakeExpired, false
	case errors.As(err, &authority):
		return HandshakeAuthority, false
	case errors.Is(err, ErrDenied):
		return HandshakeDenied, false
	case errors.Is(err, errNotAdmitted):
		return HandshakeIdentity, false
	case strings.Contains(err.Error(), "didn't provide a certificate"), errors.Is(err, errNoCertificate):
		return HandshakeMissing, false
	case strings.Contains(err.Error(), "tls: "):
		return HandshakeOther, false
	}
	return "", false
}

// alertReason is what the other side says of our certificate.
func alertReason(alert string) string {
	switch {
	case strings.Contains(alert, "expired certificate"):
		return HandshakeExpired
	case strings.Contains(alert, "unknown certificate authority"):
		return HandshakeAuthority
	case strings.Contains(alert, "certificate required"):
		return HandshakeMissing
	case strings.Contains(alert, "certificate"):
		return HandshakeRefused
	}
	return HandshakeOther
}
