package devcluster

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"reflect"
	"strings"
	"testing"
	"text/template"

	"github.com/goccy/go-yaml"
)

// TestPorts lays out the dev cluster on the ports of the design, and another on free ones, no port given twice.
func TestPorts(t *testing.T) {
	for _, free := range []bool{false, true} {
		cl, err := Plan(Options{Dir: t.TempDir(), Agents: 6, FreePorts: free})
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]string{}
		for _, c := range cl.Components {
			for _, a := range c.ports() {
				if seen[a] != "" {
					t.Errorf("%s is of %s and of %s", a, seen[a], c.Name)
				}
				seen[a] = c.Name
			}
		}
		if len(seen) != 1+3*3+3*2+6*3 {
			t.Errorf("%d ports: %v", len(seen), seen)
		}
		if got := cl.URL(cl.Role("proxy")[0]) == "http://127.0.0.1:16000"; got == free {
			t.Errorf("free ports %v: the proxy is at %s", free, cl.URL(cl.Role("proxy")[0]))
		}
	}
	if _, err := Plan(Options{Agents: -1}); err == nil {
		t.Error("a negative number of agents is taken")
	}
}

// TestConfig has a role's and a component's keys over those of the template.
func TestConfig(t *testing.T) {
	cl, err := Plan(Options{Dir: t.TempDir(), Agents: 2, Config: map[string]map[string]any{
		"agent":           {"peer": map[string]any{"stall_timeout": "30s"}, "small_blob": "1MiB"},
		"kraken-agent-02": {"peer": map[string]any{"stall_timeout": "40s"}, "names": []string{"x"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	files := template.Must(template.ParseFS(templates, "templates/*.yaml"))
	of := func(i int) map[string]any {
		text, err := cl.configOf(files, cl.Role("agent")[i], "")
		if err != nil {
			t.Fatal(err)
		}
		var keys map[string]any
		if err := yaml.Unmarshal(text, &keys); err != nil {
			t.Fatal(err)
		}
		return keys
	}
	first, second := of(0), of(1)
	peer := map[string]any{"listen": cl.Role("agent")[0].Peer, "stock_peers": true, "stall_timeout": "30s"}
	if !reflect.DeepEqual(first["peer"], peer) || first["small_blob"] != "1MiB" || first["node"] != "agent-01" {
		t.Errorf("first agent: %v", first)
	}
	if second["peer"].(map[string]any)["stall_timeout"] != "40s" || !reflect.DeepEqual(second["names"], []any{"x"}) || second["small_blob"] != "1MiB" {
		t.Errorf("second agent: %v", second)
	}
	if len(first) != len(second) {
		t.Errorf("keys differ: %v, %v", first, second)
	}
}

// TestHosts has components at other addresses, each host with the ports of the design anew; a component's line wins
// over its role's.
func TestHosts(t *testing.T) {
	core, own := Host{IP: "10.0.0.1", Namespace: "core"}, Host{IP: "10.0.0.2", Namespace: "own"}
	cl, err := Plan(Options{Dir: t.TempDir(), Agents: 3, Hosts: map[string]Host{"agent": core, "kraken-agent-02": own, "tracker": core}})
	if err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string]string{
		"agent-01": "core 10.0.0.1:16061", "agent-02": "own 10.0.0.2:16061", "agent-03": "core 10.0.0.1:16071",
		"tracker-01": "core 10.0.0.1:16020", "origin-03": " 127.0.0.1:16033",
	} {
		c, err := cl.Find(id)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.Host().Namespace + " " + c.Addr; got != want {
			t.Errorf("%s: at %q, want %q", id, got, want)
		}
	}
	for _, o := range []Options{
		{Hosts: map[string]Host{"agent": own}, Runtime: "docker"}, {FolderBucket: true, Runtime: "docker"}, {Origins: -1},
	} {
		if _, err := Plan(o); err == nil {
			t.Errorf("taken: %+v", o)
		}
	}
}

// TestFolderBucket has a cluster of one origin, which keeps every blob alone, with a folder as bucket.
func TestFolderBucket(t *testing.T) {
	dir := t.TempDir()
	cl, err := Plan(Options{Dir: dir, Origins: 1, FolderBucket: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := cl.Write(); err != nil {
		t.Fatal(err)
	}
	if len(cl.Role("testfs")) != 0 || len(cl.Role("origin")) != 1 {
		t.Errorf("components: %v", cl.Components)
	}
	for _, c := range cl.Components {
		text, err := os.ReadFile(cl.ConfigPath(c))
		if err != nil {
			t.Fatal(err)
		}
		hasBucket := c.Role == "origin" || c.Role == "build-index"
		if strings.Contains(string(text), "file://"+dir+"/bucket") != hasBucket || !strings.Contains(string(text), "replicas: 1\n") {
			t.Errorf("%s: %s", c.Name, text)
		}
	}
	if _, err := os.Stat(dir + "/bucket"); err != nil {
		t.Error(err)
	}
}

// TestWipe empties the disk of a component and leaves the folder, which may be a mount point.
func TestWipe(t *testing.T) {
	cl, err := Plan(Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	if err := cl.Write(); err != nil {
		t.Fatal(err)
	}
	dir := cl.StateDir(cl.Role("origin")[0])
	before, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir+"/blobs/x", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := cl.Wipe("origin-01"); err != nil {
		t.Fatal(err)
	}
	after, err := os.Stat(dir)
	if err != nil || !os.SameFile(before, after) {
		t.Errorf("the folder is another one, %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestUsage measures this process.
func TestUsage(t *testing.T) {
	if n, err := Memory(os.Getpid(), "VmRSS"); err != nil || n < 1<<20 {
		t.Errorf("%d bytes, %v", n, err)
	}
	if _, err := Memory(os.Getpid(), "VmNothing"); err == nil {
		t.Error("a line that is not there")
	}
	if d, err := CPU(os.Getpid()); err != nil || d < 0 {
		t.Errorf("%s, %v", d, err)
	}
}

// TestMutualTLS gives each component a certificate that the others verify, and says so in every configuration.
func TestMutualTLS(t *testing.T) {
	cl, err := Plan(Options{Dir: t.TempDir(), Agents: 1, MutualTLS: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := cl.Write(); err != nil {
		t.Fatal(err)
	}
	if _, err := cl.Issue("somebody"); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"origin-02", "agent-01", "somebody"} {
		f := cl.Certificate(id)
		pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
		if err != nil {
			t.Fatal(err)
		}
		ca, err := os.ReadFile(f.CA)
		if err != nil {
			t.Fatal(err)
		}
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(ca)
		for _, name := range []string{id, "localhost", "127.0.0.1"} {
			if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: name, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
				t.Errorf("%s as %s: %v", id, name, err)
			}
		}
	}
	for _, c := range cl.Components[1:] {
		text, err := os.ReadFile(cl.ConfigPath(c))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), cl.Certificate(c.ID()).Key) || strings.Contains(string(text), "stock_peers") {
			t.Errorf("%s: %s", c.Name, text)
		}
	}
	if _, err := Plan(Options{MutualTLS: true, Runtime: "docker"}); err == nil {
		t.Error("containers with keys that they can't read are taken")
	}
}

// A folder that was of processes serves containers, whose user must read what is in it, and the other way round.
func TestRuntimesShareAFolder(t *testing.T) {
	cl, err := Plan(Options{Dir: t.TempDir(), Agents: 1})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		runtime string
		want    os.FileMode
	}{{"process", 0o600}, {"docker", 0o644}, {"process", 0o600}} {
		cl.Runtime = c.runtime
		if err := cl.Write(); err != nil {
			t.Fatal(err)
		}
		if i, err := os.Stat(cl.ConfigPath(cl.Role("origin")[0])); err != nil || i.Mode().Perm() != c.want {
			t.Errorf("%s: %v, %v, want %v", c.runtime, i.Mode(), err, c.want)
		}
	}
}
