package swarm

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
	"log/slog"
	"math/big"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"kraken/proto/announce"
	"kraken/proto/transport"
)

// peerAuthority issues certificates of nodes.
type peerAuthority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
	n    int64
}

func newPeerAuthority(t *testing.T) *peerAuthority {
	t.Helper()
	a := &peerAuthority{t: t, file: filepath.Join(t.TempDir(), "ca.pem")}
	a.cert, a.key = a.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: "authority"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	a.write(a.file, "CERTIFICATE", a.cert.Raw)
	return a
}

func (a *peerAuthority) sign(c *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	a.n++
	c.SerialNumber, c.NotBefore = big.NewInt(a.n), time.Now().Add(-2*time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), signer)
	if err != nil {
		a.t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		a.t.Fatal(err)
	}
	return c, key
}

func (a *peerAuthority) write(file, kind string, der []byte) {
	a.t.Helper()
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
}

// node is the configuration of a node with a certificate for so long, which trusts others of the authority.
func (a *peerAuthority) node(name string, life time.Duration, admit func(*x509.Certificate) error) TLS {
	a.t.Helper()
	c := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(life), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if name != "" {
		c.URIs = []*url.URL{{Scheme: "kraken", Host: "test", Path: "/agent/" + name}}
	}
	cert, key := a.sign(c)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	dir := a.t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	a.write(certFile, "CERTIFICATE", cert.Raw)
	a.write(keyFile, "PRIVATE KEY", der)
	configs, err := transport.PeerTLS{Cert: certFile, Key: keyFile, CA: a.file}.Configs(admit, testLog())
	if err != nil {
		a.t.Fatal(err)
	}
	return TLS(configs)
}

// saidLines is what a node said.
type saidLines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *saidLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *saidLines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

var seedAddr = netip.MustParseAddrPort("192.0.2.1:6881")

func counted(c prometheus.Counter) float64 {
	var m dto.Metric
	if err := c.Write(&m); err != nil {
		return -1
	}
	return m.GetCounter().GetValue()
}

func said(cfg TLS, to *saidLines) func(*Config) {
	return func(c *Config) {
		c.TLS, c.Logger = cfg, slog.New(slog.NewTextHandler(to, &slog.HandlerOptions{Level: slog.LevelWarn}))
	}
}

// A node that others do not accept, or the other way round, is said so: on both sides, counted by reason, and in the
// readiness of who was offered peers and reached none.
func TestFailedHandshakesAreLoud(t *testing.T) {
	ours, theirs := newPeerAuthority(t), newPeerAuthority(t)
	nobody := func(*x509.Certificate) error { return errors.New("of another cluster") }
	for name, c := range map[string]struct {
		leech, seed TLS
		// who refuses says why; the other one is told, if it can be
		refuser, reason, told string
	}{
		"our certificate is expired": {
			leech: ours.node("a", -time.Hour, nil), seed: ours.node("b", time.Hour, nil), refuser: "seed", reason: "expired", told: "expired",
		},
		"their certificate is expired": {
			leech: ours.node("a", time.Hour, nil), seed: ours.node("b", -time.Hour, nil), refuser: "leech", reason: "expired", told: "refused",
		},
		"theirs is of another authority": {
			leech: ours.node("a", time.Hour, nil), seed: theirs.node("b", time.Hour, nil), refuser: "leech", reason: "authority", told: "refused",
		},
		"ours is not admitted": {
			leech: ours.node("a", time.Hour, nil), seed: ours.node("b", time.Hour, nobody), refuser: "seed", reason: "identity", told: "refused",
		},
		"we have none":   {seed: ours.node("b", time.Hour, nil), refuser: "seed", reason: "plain"},
		"they have none": {leech: ours.node("a", time.Hour, nil), refuser: "leech"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := randomBytes(61, 1<<20)
			var seedSaid, leechSaid saidLines
			seed, leech := newNode(t, said(c.seed, &seedSaid)), newNode(t, said(c.leech, &leechSaid))
			if err := leech.CheckPeers(t.Context()); err != nil {
				t.Errorf("before any peer was offered: %v", err)
			}
			d := leech.fetch(seed.seed(b), nil, seed.peer())
			defer d.part.Close()
			defer d.Close()
			eventually(t, "readiness says that no peer is reached", func() bool {
				err := leech.CheckPeers(t.Context())
				return err != nil && strings.Contains(err.Error(), "none of the peers")
			})
			refuser, other, refuserSaid, otherSaid := leech, seed, &leechSaid, &seedSaid
			if c.refuser == "seed" {
				refuser, other, refuserSaid, otherSaid = seed, leech, &seedSaid, &leechSaid
			}
			if c.reason != "" {
				eventually(t, "who refuses says why", func() bool {
					return counted(refuser.m.handshakes.WithLabelValues(c.reason, "us")) > 0 && strings.Contains(refuserSaid.String(), "reason="+c.reason)
				})
			}
			if c.told != "" {
				eventually(t, "who is refused is told", func() bool {
					return counted(other.m.handshakes.WithLabelValues(c.told, "them")) > 0 && strings.Contains(otherSaid.String(), "reason="+c.told)
				})
			}
			if n := strings.Count(seedSaid.String()+leechSaid.String(), "\n"); n > 12 {
				t.Errorf("%d lines:\n%s%s", n, &seedSaid, &leechSaid)
			}
		})
	}
}

// Once a peer is reached nothing of before is said any more.
func TestReachedAgain(t *testing.T) {
	var r Swarm
	for i := range 5 {
		r.reach.missed(seedAddr, fmt.Errorf("dial %d", i), false)
	}
	if err := r.CheckPeers(t.Context()); err == nil || !strings.Contains(err.Error(), "dial 4") {
		t.Errorf("after five misses: %v", err)
	}
	r.reach.reached()
	if err := r.CheckPeers(t.Context()); err != nil {
		t.Error(err)
	}
	r.reach.missed(seedAddr, errors.New("gone"), false)
	if err := r.CheckPeers(t.Context()); err != nil {
		t.Errorf("one peer that has gone: %v", err)
	}
	r.reach.missed(seedAddr, errors.New("expired"), true)
	if err := r.CheckPeers(t.Context()); err == nil {
		t.Error("a refused certificate is not said")
	}
}

// The peer id belongs to the certificate: a node has the one of its identity, and who shows another is let in nowhere,
// so that a peer that is banned can't come back under a new one.
func TestPeerIDBelongsToCertificate(t *testing.T) {
	a := newPeerAuthority(t)
	honest := newNode(t, func(c *Config) { c.TLS = a.node("honest", time.Hour, nil) })
	if want := announce.PeerIDOf(transport.Principal{Cluster: "test", Role: "agent", ID: "honest"}); honest.PeerID() != want {
		t.Errorf("peer id %s, want %s", idText(honest.PeerID()), want)
	}
	b := randomBytes(62, 1<<20)
	m := honest.seed(b)
	leech := newNode(t, func(c *Config) { c.TLS = a.node("leech", time.Hour, nil) })
	leech.fetch(m, nil, honest.peer()).finish()
	leech.has(b)
	unnamed := newNode(t, func(c *Config) { c.TLS = a.node("", time.Hour, nil) }) // of before identities
	unnamed.fetch(m, nil, honest.peer()).finish()

	sent := func() int64 { st := honest.client.ConnStats(); return st.BytesWrittenData.Int64() }
	before := sent()
	liar := newNode(t, func(c *Config) {
		c.TLS = a.node("liar", time.Hour, nil)
		c.TLS.Self = transport.Principal{} // it goes by an id of its own choice
	})
	d := liar.fetch(m, nil, honest.peer())
	defer d.part.Close()
	defer d.Close()
	eventually(t, "the liar is refused", func() bool {
		return counted(honest.m.handshakes.WithLabelValues(transport.HandshakeIdentity, "us")) > 0
	})
	// It counts the honest node as a peer until it has read that the connection is closed.
	eventually(t, "the liar has no peer", func() bool { return d.Stats().Peers == 0 })
	if left, n := d.Left(), sent()-before; left != m.Size || n != 0 {
		t.Errorf("a node under an id that is not its own has %d of %d bytes, and was sent %d", m.Size-left, m.Size, n)
	}
	seeding := honest.find(m.InfoHash())
	seeding.mu.Lock()
	defer seeding.mu.Unlock()
	for c := range seeding.conns {
		if c.id == liar.PeerID() {
			t.Error("a node was let in under an id that is not its own")
		}
	}
}
