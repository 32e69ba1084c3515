package upstream

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"kraken/proto/registry"
)

// DebianOptions are how a Debian registry asks for a login, over TLS.
type DebianOptions struct {
	// Token is `auth: token` with a token service of the test's, else htpasswd.
	Token          bool
	User, Password string
	// NoTLS serves plain HTTP.
	NoTLS bool
	// Open wants no login.
	Open bool
}

// Debian is Debian's docker-registry as an upstream.
type Debian struct {
	URL, Host, Alias, CAFile string
	// Pusher speaks to a second one on the same disk, without a login, to fill it.
	Pusher *registry.Client

	o      DebianOptions
	log    string
	mu     sync.Mutex
	tokens int
}

// NewDebian starts one that ends with the test. Where the program is not installed the test is skipped, or fails with
// KRAKEN_TEST_REQUIRE=1.
func NewDebian(t testing.TB, o DebianOptions) *Debian {
	t.Helper()
	if _, err := exec.LookPath("docker-registry"); err != nil {
		if os.Getenv("KRAKEN_TEST_REQUIRE") == "1" {
			t.Fatal("docker-registry is not installed: test/setup.sh gcc does it")
		}
		t.Skip("docker-registry is not installed")
	}
	dir := t.TempDir()
	d := &Debian{Host: freeAddr(t), o: o, log: filepath.Join(dir, "log")}
	d.URL, d.Alias = "https://"+d.Host, strings.Replace(d.Host, ":", "_", 1)
	http := fmt.Sprintf("http: {addr: %q, secret: x", d.Host)
	ca := newAuthority(t, dir)
	if o.NoTLS {
		d.URL = "http://" + d.Host
	} else {
		d.CAFile = ca.file
		http += fmt.Sprintf(", tls: {certificate: %q, key: %q}", ca.file, ca.keyFile)
	}
	common := fmt.Sprintf("version: 0.1\nlog: {accesslog: {disabled: false}}\nstorage: {filesystem: {rootdirectory: %q}}\n", filepath.Join(dir, "state"))
	auth := ""
	switch {
	case o.Open:
	case o.Token:
		realm := httptest.NewUnstartedServer(d.tokenService(t, ca))
		if o.NoTLS {
			realm.Start()
		} else {
			realm.TLS = ca.tls(t)
			realm.StartTLS()
		}
		t.Cleanup(realm.Close)
		auth = fmt.Sprintf("auth: {token: {realm: %q, service: debian, issuer: test, rootcertbundle: %q}}\n", realm.URL+"/token", ca.file)
	default:
		hash, err := bcrypt.GenerateFromPassword([]byte(o.Password), bcrypt.MinCost)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, "htpasswd")
		write(t, file, fmt.Appendf(nil, "%s:%s\n", o.User, hash))
		auth = fmt.Sprintf("auth: {htpasswd: {realm: debian, path: %q}}\n", file)
	}
	serve(t, dir, "main", d.Host, d.log, common+http+"}\n"+auth)
	push := freeAddr(t)
	serve(t, dir, "push", push, filepath.Join(dir, "push.log"), common+fmt.Sprintf("http: {addr: %q, secret: x}\n", push))
	c, err := registry.NewClient("http://"+push, &registryHTTP)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(registryHTTP.CloseIdleConnections)
	d.Pusher = c
	return d
}

var registryHTTP = http.Client{Transport: &http.Transport{}}

// PutImage pushes an image with these layers.
func (d *Debian) PutImage(t testing.TB, repo, tag string, layers ...[]byte) Image {
	t.Helper()
	// The same image in a scripted registry says what to push.
	s := New(t, Options{})
	img := s.PutImage(repo, tag, layers...)
	for _, desc := range append(img.Layers, img.Config) {
		b := s.blobs[desc.Digest]
		u, err := d.Pusher.StartUpload(t.Context(), repo, registry.UploadOptions{Size: -1})
		if err == nil {
			_, err = d.Pusher.CommitUpload(t.Context(), repo, u.ID, desc.Digest, registry.Chunk{Length: int64(len(b)), Body: bytes.NewReader(b)})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := d.Pusher.PutManifest(t.Context(), repo, registry.Reference{Tag: tag}, img.Manifest.MediaType, s.blobs[img.Manifest.Digest], registry.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	return img
}

// Count returns how many requests the access log has that begin with start ("GET /v2/a/b/manifests/").
func (d *Debian) Count(t testing.TB, start string) int {
	t.Helper()
	b, err := os.ReadFile(d.log)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), `"`+start)
}

// Tokens returns how many tokens were given.
func (d *Debian) Tokens() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.tokens
}

// serve runs the program until the test ends, and returns when it answers.
func serve(t testing.TB, dir, name, addr, log, cfg string) {
	t.Helper()
	file := filepath.Join(dir, name+".yml")
	write(t, file, []byte(cfg))
	out, err := os.Create(log)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("docker-registry", "serve", file)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		out.Close()
	})
	for began := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
			return
		}
		if time.Since(began) > 20*time.Second {
			t.Fatalf("docker-registry does not answer: %s", must(os.ReadFile(log)))
		}
	}
}

func must(b []byte, _ error) []byte { return b }

func freeAddr(t testing.TB) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func write(t testing.TB, file string, b []byte) {
	t.Helper()
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// authority is a self-signed certificate of 127.0.0.1, which serves TLS and signs tokens.
type authority struct {
	key           *ecdsa.PrivateKey
	der           []byte
	file, keyFile string
}

func newAuthority(t testing.TB, dir string) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "debian"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{key, der, filepath.Join(dir, "ca.pem"), filepath.Join(dir, "ca.key")}
	write(t, a.file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	write(t, a.keyFile, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: pkcs}))
	return a
}

// tokenService gives tokens to who has the password.
func (d *Debian) tokenService(t testing.TB, ca *authority) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user, password, _ := r.BasicAuth()
		if user != d.o.User || password != d.o.Password {
			writeError(w, http.StatusUnauthorized, "UNAUTHORIZED", "wrong password")
			return
		}
		d.mu.Lock()
		d.tokens++
		d.mu.Unlock()
		type access struct {
			Type    string   `json:"type"`
			Name    string   `json:"name"`
			Actions []string `json:"actions"`
		}
		var list []access
		for _, s := range r.URL.Query()["scope"] {
			if parts := strings.Split(s, ":"); len(parts) == 3 {
				list = append(list, access{parts[0], parts[1], strings.Split(parts[2], ",")})
			}
		}
		now := time.Now().Unix()
		value := ca.sign(t, map[string]any{"iss": "test", "sub": user, "aud": "debian", "exp": now + 300, "nbf": now - 10, "iat": now, "jti": fmt.Sprint(now), "access": list})
		json.NewEncoder(w).Encode(map[string]any{"token": value, "expires_in": 300})
	})
}

// sign returns claims as a JWT that names its certificate.
func (a *authority) sign(t testing.TB, claims any) string {
	enc := base64.RawURLEncoding
	head := Marshal(t, map[string]any{"typ": "JWT", "alg": "ES256", "x5c": []string{base64.StdEncoding.EncodeToString(a.der)}})
	text := enc.EncodeToString(head) + "." + enc.EncodeToString(Marshal(t, claims))
	sum := sha256.Sum256([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, a.key, sum[:])
	if err != nil {
		t.Error(err)
		return ""
	}
	sig := make([]byte, 64)
	r.FillBytes(sig[:32])
	s.FillBytes(sig[32:])
	return text + "." + enc.EncodeToString(sig)
}

func (a *authority) tls(t testing.TB) *tls.Config {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(a.file, a.keyFile)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{pair}}
}
