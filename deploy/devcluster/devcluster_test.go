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
