package transport

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/config"
)

// A certificate is warned of in time, again after a while, and no more once another one is there.
func TestExpiryWarns(t *testing.T) {
	p := newParty(t, newAuthority(t), "node")
	end := certificatesIn(t, p.cert)[0].NotAfter
	var out bytes.Buffer
	reg := prometheus.NewRegistry()
	e := NewExpiry(slog.New(slog.NewTextHandler(&out, nil)), reg)
	e.Watch("", p.cert, p.cert)
	for _, c := range []struct {
		before time.Duration
		says   string
	}{
		{30 * 24 * time.Hour, ""},
		{13 * 24 * time.Hour, "expires in 312h"},
		{13*24*time.Hour - time.Hour, ""}, // said already
		{12 * 24 * time.Hour, "expires in 288h"},
		{-time.Hour, "has expired"},
		{-2 * time.Hour, ""},
		{30 * 24 * time.Hour, ""}, // another clock, or another file
		{13 * 24 * time.Hour, "expires in 312h"},
	} {
		out.Reset()
		e.look(end.Add(-c.before))
		if got := out.String(); (got == "") != (c.says == "") || !strings.Contains(got, c.says) {
			t.Errorf("%s before the end: %q, want %q", c.before, got, c.says)
		}
	}
	all, err := reg.Gather()
	if err != nil || len(all) != 1 || len(all[0].GetMetric()) != 1 || all[0].GetMetric()[0].GetGauge().GetValue() != float64(end.Unix()) {
		t.Errorf("metrics: %v, %v", all, err)
	}
}

// One that is renewed each day is not warned of all its life.
func TestShortLivesAreNotWarnedOf(t *testing.T) {
	now := time.Now()
	s := span{begin: now, end: now.Add(24 * time.Hour)}
	for after, want := range map[time.Duration]bool{0: false, 17 * time.Hour: false, 19 * time.Hour: true, 25 * time.Hour: true} {
		if got := s.ending(now.Add(after)); (got != "") != want {
			t.Errorf("after %s: %q", after, got)
		}
	}
}

// A configuration with a certificate that others refuse for its dates is a mistake. Of several authorities one will do.
func TestExpiredIsAMistake(t *testing.T) {
	now := time.Now()
	good, expired := newAuthority(t), filepath.Join(t.TempDir(), "expired.pem")
	k := newKey(t)
	old := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: now.Add(-2 * time.Hour), NotAfter: now.Add(-time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, old, old, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, expired, "CERTIFICATE", der)
	c := certificatesIn(t, expired)[0]
	for at, want := range map[time.Time]string{c.NotAfter.Add(-time.Minute): "", c.NotAfter.Add(time.Minute): "expired at", c.NotBefore.Add(-time.Minute): "is not valid before"} {
		err := validTime(c, at)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("at %s: %v, want %q", at, err, want)
		}
	}
	var m config.Mistakes
	validCA(&m, "ca", expired)
	if len(m) != 1 || !strings.Contains(m.Error(), "expired at") {
		t.Errorf("an authority that has expired: %v", m)
	}
	both := append(readFile(t, expired), readFile(t, good.file)...)
	if err := os.WriteFile(expired, both, 0o600); err != nil {
		t.Fatal(err)
	}
	m = nil
	if validCA(&m, "ca", expired); len(m) != 0 {
		t.Errorf("one of two authorities has expired: %v", m)
	}
}

func readFile(t *testing.T, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func certificatesIn(t *testing.T, file string) []*x509.Certificate {
	t.Helper()
	return certificatesOf(readFile(t, file))
}
