package cluster

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"kraken/deploy/certs"
)

// settled is longer than any node takes to notice a file that has changed, which it looks at each second.
const settled = 2500 * time.Millisecond

// TestRotation renews every certificate and key, puts another authority in the place of the first, and renews them all
// once more, while images are pushed and pulled all the time: no request fails. What was issued by the first authority
// is worth nothing afterwards.
func TestRotation(t *testing.T) {
	c := NewMutualTLS(t, 2)
	stolen := c.plan.Certificate("agent-01")
	pair, err := tls.LoadX509KeyPair(stolen.Cert, stolen.Key)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- rotate(c.plan.CertificateDir()) }()
	pushed := 0
	for rotating := true; rotating; pushed++ {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			rotating = false // and once more with what there is now
		default:
		}
		repo, layer := fmt.Sprintf("rotation/app-%d", pushed), noise(2<<20, byte(100+pushed))
		raw, _ := image(t, c.Proxy, repo, "v1", layer)
		for _, a := range c.Agents {
			wantManifest(t, a, repo, "v1", raw)
			wantBlob(t, a, repo, layer)
		}
	}
	if pushed < 5 {
		t.Errorf("only %d images were pushed meanwhile", pushed)
	}
	ca, err := os.ReadFile(stolen.CA)
	if err != nil {
		t.Fatal(err)
	}
	cfg := &tls.Config{RootCAs: x509.NewCertPool(), Certificates: []tls.Certificate{pair}}
	cfg.RootCAs.AppendCertsFromPEM(ca)
	hc := &http.Client{Transport: &http.Transport{TLSClientConfig: cfg}}
	defer hc.CloseIdleConnections()
	if resp, err := hc.Get(c.OriginURLs[0] + "/v2/"); err == nil {
		resp.Body.Close()
		t.Errorf("a certificate of an authority that was dropped is taken: %s", resp.Status)
	} else if !strings.Contains(err.Error(), "certificate") {
		t.Errorf("another error: %v", err)
	}
}

// rotate is what an operator does, with time for the nodes to notice after each step.
func rotate(dir string) error {
	for _, step := range []func(*certs.Authority) error{
		func(a *certs.Authority) error { _, err := a.Renew(0, true); return err },
		func(a *certs.Authority) error { return a.Next(certs.AuthorityLife) },
		(*certs.Authority).Switch,
		func(a *certs.Authority) error { _, err := a.Renew(0, true); return err },
		(*certs.Authority).Drop,
	} {
		a, err := certs.Open(dir)
		if err != nil {
			return err
		}
		if err := step(a); err != nil {
			return err
		}
		time.Sleep(settled)
	}
	return nil
}
