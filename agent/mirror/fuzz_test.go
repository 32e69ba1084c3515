package mirror

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/pelletier/go-toml/v2"
)

// merged are the files that an installation is merged into, how that is done and undone, and how the result is read.
var merged = []struct {
	name    string
	files   func(n node, s Settings) ([]file, error)
	without func(name string, text []byte, ours []string) ([]byte, error)
	read    func([]byte, any) error
}{
	{"/etc/docker/daemon.json", dockerFiles, dockerWithout, json.Unmarshal},
	{"/etc/rancher/k3s/registries.yaml", rancherFiles("/etc/rancher/k3s"), rancherWithout, func(b []byte, v any) error { return yaml.Unmarshal(b, v) }},
	{"/etc/buildkit/buildkitd.toml", buildkitFiles, buildkitWithout, func(b []byte, v any) error { return toml.Unmarshal(b, v) }},
	{"hosts.toml", func(n node, s Settings) ([]file, error) {
		text, err := n.read("hosts.toml")
		if err == nil {
			text, err = hostsTOML(s, version{2, 4}, text)
		}
		return []file{{"hosts.toml", text}}, err
	}, containerdWithout, func(b []byte, v any) error { return toml.Unmarshal(b, v) }},
}

// Whatever is in a runtime's file, it is refused, or becomes one that can be read and has the agent; installing again
// changes nothing, and what takes the agent out leaves what can be read, and no agent.
func FuzzMerge(f *testing.F) {
	for _, text := range []string{
		"", "{}", "null", "[]", `{"registry-mirrors":["https://m.corp"],"debug":true}`, `{"registry-mirrors":"x"}`, `{"registry-mirrors":[1,null]}`,
		"mirrors:\n  docker.io:\n    endpoint: [https://m.corp]\n", "mirrors: [1]\n", "mirrors:\n  '*': null\n", "---\n", "server = \"https://a\"\n[host.\"https://b\"]\n  capabilities = [\"pull\"]\n",
		"[registry.\"docker.io\"]\n  mirrors = [\"m\"]\n", "debug = true", "[registry]\n", "registry = 1\n", "[[host]]\n", "a = '''\n[b]\n'''\n",
	} {
		for i := range merged {
			f.Add(byte(i), text)
		}
	}
	root := f.TempDir()
	f.Fuzz(func(t *testing.T, which byte, text string) {
		m := merged[int(which)%len(merged)]
		n, s := node{root: root}, Settings{Agent: "http://127.0.0.1:16061", DockerHub: "http://127.0.0.1:16063", Registries: []string{"docker.io"}}
		write := func(b []byte) {
			if err := os.MkdirAll(filepath.Dir(n.at(m.name)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(n.at(m.name), b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		write([]byte(text))
		first, err := m.files(n, s)
		if err != nil {
			return
		}
		var doc map[string]any
		if err := m.read(first[0].text, &doc); err != nil || !bytes.Contains(first[0].text, []byte("127.0.0.1:1606")) {
			t.Fatalf("%s of %q is %q: %v", m.name, text, first[0].text, err)
		}
		write(first[0].text)
		second, err := m.files(n, s)
		if m.name == "hosts.toml" {
			return // it is made of what is there without the agent
		}
		if err != nil || !bytes.Equal(first[0].text, second[0].text) {
			t.Fatalf("%s of %q is %q, and then %q: %v", m.name, text, first[0].text, second[0].text, err)
		}
		rest, err := m.without(m.name, first[0].text, []string{s.Agent, s.DockerHub})
		if err == nil {
			doc = nil
			err = m.read(rest, &doc)
		}
		if err != nil && len(rest) > 0 {
			t.Fatalf("%s of %q, taken out of %q, is %q: %v", m.name, text, first[0].text, rest, err)
		}
	})
}
