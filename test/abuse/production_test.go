package abuse

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"kraken/deploy/certs"
	"kraken/proto/cluster"
	"kraken/proto/transport"
	"kraken/test/netns"
)

// production is a cluster of the samples in deploy/config/production as they stand: only the folders in them are
// others, so that nothing of this machine's is touched. Each process is on a host of its own, a network namespace.
type production struct {
	t     *testing.T
	dir   string
	net   *netns.Network
	ca    *certs.Authority
	hosts map[string]*netns.Node
}

// in are the roles of the hosts.
var in = map[string]transport.Role{
	"origin-01": transport.RoleOrigin, "origin-02": transport.RoleOrigin, "origin-03": transport.RoleOrigin, "tracker": transport.RoleTracker,
	"build-index": transport.RoleBuildIndex, "registry": transport.RoleProxy, "node-1": transport.RoleAgent, "node-2": transport.RoleAgent,
}

func newProduction(t *testing.T) *production {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("KRAKEN_TEST_REQUIRE") == "1" {
			t.Fatal("root is needed for network namespaces")
		}
		t.Skip("needs root: each process has a network namespace of its own")
	}
	p := &production{t: t, dir: t.TempDir(), hosts: map[string]*netns.Node{}}
	tag := fmt.Sprintf("kp%d", os.Getpid()%10000)
	n, err := netns.New(tag, append(slices.Sorted(mapKeys(in)), "bucket")...)
	if err != nil {
		t.Fatal(err)
	}
	p.net = n
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	var names strings.Builder
	names.WriteString("127.0.0.1 localhost\n")
	for _, x := range n.Nodes {
		p.hosts[x.Name] = x
		fmt.Fprintf(&names, "%s %s.kraken.example\n", x.IP, x.Name)
	}
	for _, x := range n.Nodes { // ip netns exec lays these over /etc
		etc := filepath.Join("/etc/netns", x.Namespace)
		p.make(etc)
		t.Cleanup(func() { os.RemoveAll(etc) })
		p.write(filepath.Join(etc, "hosts"), names.String())
	}
	if p.ca, err = certs.Init(filepath.Join(p.dir, "authority"), "prod", certs.AuthorityLife); err != nil {
		t.Fatal(err)
	}
	return p
}

func mapKeys[K comparable, V any](m map[K]V) func(func(K) bool) {
	return func(yield func(K) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

func (p *production) make(dir string) {
	p.t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		p.t.Fatal(err)
	}
}

func (p *production) write(file, content string) {
	p.t.Helper()
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// issue makes a certificate, and returns the files that hold it and the key.
func (p *production) issue(role transport.Role, id string, hosts ...string) (cert, key string) {
	p.t.Helper()
	i, err := p.ca.Issue(certs.Request{Role: role, ID: id, Hosts: hosts, Life: certs.CertificateLife})
	if err != nil {
		p.t.Fatal(err)
	}
	return i.File, i.KeyFile
}

// etc fills /etc/kraken of a host, as an operator would, and returns the folder that stands for it.
func (p *production) etc(host string, signer string) string {
	p.t.Helper()
	etc := filepath.Join(p.dir, host, "etc")
	p.make(etc)
	cert, key := p.issue(in[host], host, host+".kraken.example", p.hosts[host].IP)
	for to, from := range map[string]string{
		"tls.crt": cert, "tls.key": key, "front.crt": cert, "front.key": key, "ca.crt": filepath.Join(p.ca.Dir, certs.AuthorityFile),
		"record.key": signer, "record.key.pub": signer + ".pub",
	} {
		b, err := os.ReadFile(from)
		if err != nil {
			p.t.Fatal(err)
		}
		p.write(filepath.Join(etc, to), string(b))
	}
	p.write(filepath.Join(etc, "denied"), "")
	p.write(filepath.Join(etc, "bucket-access-key"), "dev")
	p.write(filepath.Join(etc, "bucket-secret-key"), "dev")
	p.write(filepath.Join(etc, "upload.key"), "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=")
	return etc
}

// run runs a program at a host until the test ends.
func (p *production) run(host string, env []string, argv ...string) {
	p.t.Helper()
	log, err := os.Create(filepath.Join(p.dir, host, "log"))
	if err != nil {
		p.t.Fatal(err)
	}
	cmd := exec.Command("ip", append([]string{"netns", "exec", p.hosts[host].Namespace}, argv...)...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
		_ = log.Close()
		if p.t.Failed() {
			b, _ := os.ReadFile(log.Name())
			p.t.Logf("the end of the log of %s:\n%s", host, b[max(0, len(b)-2000):])
		}
	})
}

// start starts a role by its sample.
func (p *production) start(host, signer, bucket string) {
	p.t.Helper()
	role := string(in[host])
	b, err := os.ReadFile(filepath.Join("../../deploy/config/production", role+".yaml"))
	if err != nil {
		p.t.Fatal(err)
	}
	lib := filepath.Join(p.dir, host, "lib")
	text := strings.NewReplacer("/etc/kraken/", p.etc(host, signer)+"/", "/var/lib/kraken/", lib+"/").Replace(string(b))
	for _, sub := range []string{"origin", "build-index", "agent"} {
		p.make(filepath.Join(lib, sub))
	}
	file := filepath.Join(p.dir, host, "config.yaml")
	p.write(file, text)
	env := []string{"KRAKEN_ID=" + host, "KRAKEN_NODE=" + host, "KRAKEN_ADDRESS=" + p.hosts[host].IP, "KRAKEN_BUCKET=" + bucket}
	p.run(host, env, filepath.Join(bin, "kraken-"+role), "--config", file)
}

// client is a client on a host, with a certificate where cert is not empty.
func (p *production) client(host, cert, key string) *http.Client {
	p.t.Helper()
	cfg := &tls.Config{RootCAs: x509.NewCertPool()}
	ca, err := os.ReadFile(filepath.Join(p.ca.Dir, certs.AuthorityFile))
	if err != nil {
		p.t.Fatal(err)
	}
	cfg.RootCAs.AppendCertsFromPEM(ca)
	if cert != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			p.t.Fatal(err)
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	hc := p.hosts[host].Client()
	hc.Transport.(*http.Transport).TLSClientConfig = cfg
	hc.Timeout = time.Minute
	p.t.Cleanup(hc.CloseIdleConnections)
	return hc
}

func (p *production) url(host string, port int) string {
	return fmt.Sprintf("https://%s:%d", p.hosts[host].IP, port)
}

// TestProductionSamples starts a whole cluster from the production samples: an image goes through it, the swarm is in
// use, and every listener but an agent's registry, which is on loopback, asks for the right certificate.
func TestProductionSamples(t *testing.T) {
	p := newProduction(t)
	signer := filepath.Join(p.dir, "record.key")
	if _, _, err := cluster.OpenNameSigner(signer); err != nil {
		t.Fatal(err)
	}
	p.make(filepath.Join(p.dir, "bucket"))
	p.run("bucket", nil, filepath.Join(bin, "kraken-testfs"), "--listen", p.hosts["bucket"].IP+":16050", "--dir", filepath.Join(p.dir, "bucket"))
	for _, host := range slices.Sorted(mapKeys(in)) {
		p.start(host, signer, "s3://kraken?region=us-east-1&use_path_style=true&endpoint=http://"+p.hosts["bucket"].IP+":16050")
	}
	operatorCert, operatorKey := p.issue(transport.RoleOperator, "alice")
	operator, anybody := p.client("registry", operatorCert, operatorKey), p.client("registry", "", "")
	admins := map[string]int{"origin-01": 16034, "origin-02": 16034, "origin-03": 16034, "tracker": 16021, "build-index": 16011, "registry": 16001, "node-1": 16063, "node-2": 16063}
	for host, port := range admins {
		eventually(t, time.Minute, func() error { return p.healthy(operator, host, port) })
	}

	content := random(5 << 20)
	manifest := push(t, anybody, p.url("registry", 16000), "team/app", "v1", content)
	for _, node := range []string{"node-1", "node-2"} {
		got, layers := pull(t, p.client(node, "", ""), "http://127.0.0.1:16061", "team/app", "v1")
		if !bytes.Equal(got, manifest) || !bytes.Equal(layers[0], content) {
			t.Errorf("%s pulled something else", node)
		}
	}
	metrics := do(t, operator, "GET", p.url("node-2", 16063), "/metrics", nil).want(t, http.StatusOK, "metrics")
	if !strings.Contains(string(metrics.body), "kraken_certificate_not_after_seconds{") {
		t.Error("no metric says until when certificates are valid")
	}
	do(t, operator, "GET", p.url("tracker", 16021), "/swarms", nil).want(t, http.StatusOK, "the tracker's swarms on admin")
	for host, port := range admins {
		if err := p.healthy(operator, host, port); err != nil {
			t.Errorf("after the pulls: %v", err)
		}
	}

	node := p.client("node-1", filepath.Join(p.dir, "node-1/etc/tls.crt"), filepath.Join(p.dir, "node-1/etc/tls.key"))
	for host, port := range admins {
		do(t, node, "GET", p.url(host, port), "/metrics", nil).want(t, http.StatusForbidden, "a node at the admin listener of "+host)
		if a, err := try(anybody, "GET", p.url(host, port), "/health", nil); err == nil {
			t.Errorf("the admin listener of %s answers who has no certificate: %d", host, a.status)
		}
	}
	for host, port := range map[string]int{"origin-01": 16031, "tracker": 16020, "build-index": 16010} {
		if a, err := try(anybody, "GET", p.url(host, port), "/v2/", nil); err == nil {
			t.Errorf("%s answers who has no certificate: %d", host, a.status)
		}
	}
	do(t, node, "DELETE", p.url("build-index", 16010), "/v2/team/app/manifests/v1", nil).want(t, http.StatusForbidden, "a node that deletes a tag")
}

// healthy returns why a host is not ready, or what it does without.
func (p *production) healthy(hc *http.Client, host string, port int) error {
	ctx, cancel := context.WithTimeout(p.t.Context(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url(host, port)+"/readiness", nil)
	if err != nil {
		return err
	}
	resp, err := hc.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	var state struct {
		Status   string `json:"status"`
		Degraded []any  `json:"degraded"`
	}
	if err = errors.Join(err, json.Unmarshal(b, &state)); err == nil && (state.Status != "ready" || len(state.Degraded) > 0) {
		err = fmt.Errorf("%s: %.500s", host, b)
	}
	return err
}
