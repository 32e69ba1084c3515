package mirror

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

// answering is an agent that has one image of registry.k8s.io.
func answering(t *testing.T) *httptest.Server {
	t.Helper()
	layer := []byte("a layer")
	raw, err := json.Marshal(map[string]any{"layers": []any{map[string]any{"digest": digest.FromBytes(layer), "size": len(layer)}}})
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
		switch {
		case r.URL.Path == "/v2/":
		case r.URL.Query().Get("ns") != "registry.k8s.io":
			w.WriteHeader(http.StatusNotFound)
		case r.URL.Path == "/v2/pause/manifests/3.10":
			w.Header().Set("Docker-Content-Digest", digest.FromBytes(raw).String())
			_, _ = w.Write(raw)
		case strings.HasPrefix(r.URL.Path, "/v2/pause/blobs/"):
			_, _ = w.Write(layer)
		}
	}))
	t.Cleanup(s.Close)
	return s
}

// Each misconfiguration that keeps runtimes from an agent without a word is found and named, and nothing else is.
func TestDoctorFindsWhatWasPlanted(t *testing.T) {
	agent := answering(t)
	config := "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\n  config_path = \"/etc/containerd/certs.d\"\n"
	config3 := strings.ReplaceAll(newConfig, ":/etc/docker/certs.d", "")
	hosts := func(more string) string {
		return fmt.Sprintf("[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n%s", agent.URL, more)
	}
	const at = "/etc/containerd/certs.d/_default/hosts.toml"
	down := func(s *Settings) { s.Agent = "http://127.0.0.1:1" }
	for _, c := range []struct {
		what   string
		files  map[string]string
		change func(*Settings)
		want   Kind
	}{
		{"nothing", map[string]string{containerdConfig: config, at: hosts("")}, nil, ""},
		{"nothing, with containerd 2.x", map[string]string{containerdConfig: config3, at: hosts("")}, func(s *Settings) { s.ContainerdVersion = "2.4" }, ""},
		{"a list as config_path", map[string]string{containerdConfig: newConfig, at: hosts("")}, func(s *Settings) { s.ContainerdVersion = "2.4" }, ListConfigPath},
		{"the same list, which 1.x knows", map[string]string{containerdConfig: strings.Replace(config, "certs.d\"", "certs.d:/etc/docker/certs.d\"", 1), at: hosts("")}, nil, ""},
		{"the same list, by containerd's default", map[string]string{"/usr/bin/containerd": "", at: hosts("")}, func(s *Settings) { s.ContainerdVersion = "2.2" }, ListConfigPath},
		{"a TOML error", map[string]string{containerdConfig: config, at: hosts("  dial_timeout = 200ms\n")}, nil, BrokenFile},
		{"legacy keys", map[string]string{containerdConfig: config + "  [plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"docker.io\"]\n    endpoint = [\"x\"]\n", at: hosts("")}, nil, LegacyKeys},
		{"TLS keys on a plain port", map[string]string{containerdConfig: config, at: hosts("  skip_verify = true\n")}, nil, TLSOnPlain},
		{"an authority on a plain port", map[string]string{containerdConfig: config, at: hosts("  ca = \"/x.crt\"\n")}, nil, TLSOnPlain},
		{"server that forbids fall-back", map[string]string{containerdConfig: config, at: fmt.Sprintf("server = %q\n", agent.URL) + hosts("")}, nil, NoFallback},
		{"the same, meant", map[string]string{containerdConfig: config, at: fmt.Sprintf("server = %q\n", agent.URL) + hosts("")}, func(s *Settings) { s.NoFallback = true }, ""},
		{"a wrong port", map[string]string{containerdConfig: config, at: "[host.\"http://127.0.0.1:5\"]\n  capabilities = [\"pull\"]\n"}, nil, WrongPort},
		{"the agent down", map[string]string{containerdConfig: config, at: strings.ReplaceAll(hosts(""), agent.URL, "http://127.0.0.1:1")}, down, AgentDown},
		{"an unknown capability", map[string]string{containerdConfig: config, at: strings.ReplaceAll(hosts(""), `"resolve"`, `"resolv"`)}, nil, BadCapability},
		{"a capability before its time", map[string]string{containerdConfig: config, at: strings.ReplaceAll(hosts(""), `"resolve"`, `"referrers"`)}, nil, BadCapability},
		{"the same in its time", map[string]string{containerdConfig: config3, at: strings.ReplaceAll(hosts(""), `"resolve"`, `"referrers"`)}, func(s *Settings) { s.ContainerdVersion = "2.2" }, ""},
		{"a folder of another name", map[string]string{containerdConfig: config, at: hosts(""), "/etc/containerd/certs.d/registry-1.docker.io/hosts.toml": hosts("")}, nil, WrongFolder},
		{"a folder called default", map[string]string{containerdConfig: config, "/etc/containerd/certs.d/default/hosts.toml": hosts("")}, nil, WrongFolder},
		{"no config_path", map[string]string{containerdConfig: "version = 2\n", at: hosts("")}, nil, NoConfigPath},
		{"nothing installed", map[string]string{containerdConfig: config}, nil, NotUsed},
		{"a broken daemon.json", map[string]string{containerdConfig: config, at: hosts(""), daemonJSON: "{"}, nil, BrokenFile},
		{"Docker at the listener that wants names", map[string]string{daemonJSON: fmt.Sprintf(`{"registry-mirrors":[%q]}`, agent.URL)}, nil, WrongPort},
	} {
		s := settings(plant(t, c.files))
		s.Agent, s.DockerHub = agent.URL, ""
		if c.change != nil {
			c.change(&s)
		}
		found, err := Doctor(t.Context(), s)
		if err != nil {
			t.Errorf("%s: %v", c.what, err)
			continue
		}
		kinds := map[Kind]bool{}
		for _, f := range found {
			kinds[f.Kind] = true
			if f.Problem == "" || f.Remedy == "" || f.Where == "" || strings.Contains(f.Where, s.Root) {
				t.Errorf("%s: %+v", c.what, f)
			}
		}
		want := []Kind{c.want}
		if c.want == "" {
			want = nil
		}
		if got := slices.Collect(maps.Keys(kinds)); !slices.Equal(got, want) {
			t.Errorf("%s: found %v\n%v", c.what, got, found)
		}
	}
}

// A proxy variable matters where the agent is not on loopback.
func TestDoctorFindsAProxy(t *testing.T) {
	const agent = "http://10.255.255.1:16061"
	files := map[string]string{
		containerdConfig: "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\n  config_path = \"/etc/containerd/certs.d\"\n",
		"/etc/containerd/certs.d/_default/hosts.toml":         fmt.Sprintf("[host.%q]\n", agent),
		"/etc/systemd/system/containerd.service.d/proxy.conf": "[Service]\nEnvironment=\"HTTP_PROXY=http://proxy:3128\" \"NO_PROXY=localhost,.corp\"\n",
	}
	d := &diagnosis{node: node{root: plant(t, files)}, s: Settings{Agent: agent}}
	if err := d.proxies(); err != nil || len(d.findings) != 1 || d.findings[0].Kind != ProxyVariable || d.findings[0].Where != "/etc/systemd/system/containerd.service.d/proxy.conf" {
		t.Errorf("%v, %v", err, d.findings)
	}
	for _, fine := range []string{"NO_PROXY=localhost,10.0.0.0/8", "NO_PROXY=10.255.255.1"} {
		files["/etc/systemd/system/containerd.service.d/proxy.conf"] = "Environment=\"HTTP_PROXY=http://proxy:3128\" \"" + fine + "\"\n"
		d := &diagnosis{node: node{root: plant(t, files)}, s: Settings{Agent: agent}}
		if err := d.proxies(); err != nil || len(d.findings) != 0 {
			t.Errorf("%s: %v, %v", fine, err, d.findings)
		}
	}
}

// The probe reads an image with the registry's name, and checks what comes.
func TestProbe(t *testing.T) {
	agent := answering(t)
	var out bytes.Buffer
	s := Settings{Agent: agent.URL}
	if err := Probe(t.Context(), s, DefaultProbe, &out); err != nil || !strings.Contains(out.String(), "1 blobs, 7 bytes") {
		t.Errorf("%v %s", err, &out)
	}
	if err := Probe(t.Context(), s, "alpine", &out); err == nil || !strings.Contains(err.Error(), "does not mirror docker.io") {
		t.Errorf("an image that is not mirrored: %v", err)
	}
	for image, want := range map[string][3]string{
		"nginx": {"docker.io", "library/nginx", "latest"}, "a/b:1": {"docker.io", "a/b", "1"}, "localhost:5000/a": {"localhost:5000", "a", "latest"},
		"ghcr.io/a/b@sha256:00": {"ghcr.io", "a/b", "sha256:00"},
	} {
		r, repo, ref, err := splitImage(image)
		if err != nil || [3]string{r, repo, ref} != want {
			t.Errorf("%s: %s %s %s %v", image, r, repo, ref, err)
		}
	}
}

func FuzzSetConfigPath(f *testing.F) {
	f.Add(oldConfig)
	f.Add(newConfig)
	f.Add("a = 1\n[b]\nconfig_path=3")
	f.Fuzz(func(t *testing.T, text string) {
		setConfigPath([]byte(text), criRegistry2, certsD) // whatever comes is checked by its reader
		_, _, _, _ = splitImage(text)
	})
}
