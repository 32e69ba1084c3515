package mirror

import (
	"bytes"
	"encoding/json"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/pelletier/go-toml/v2"
)

const (
	containersConf = "/etc/containers/registries.conf.d/50-kraken.conf"
	daemonJSON     = "/etc/docker/daemon.json"
	buildkitdTOML  = "/etc/buildkit/buildkitd.toml"
)

func hasContainers(n node) bool { return n.has("/etc/containers", "/usr/bin/podman", "/etc/crio") }

// alias is a registry's name as a path element.
func alias(registry string) string { return strings.Replace(registry, ":", "_", 1) }

// containersFiles is for Podman, CRI-O, skopeo and buildah: a mirror of each registry, whose location has the registry
// in the path, because these send no ?ns=.
func containersFiles(_ node, s Settings) ([]file, error) {
	var b bytes.Buffer
	b.WriteString(made)
	for _, r := range s.listed() {
		at := s.hostPort() + "/" + alias(r)
		fmt.Fprintf(&b, "\n[[registry]]\nprefix = %q\n", r)
		if s.NoFallback {
			fmt.Fprintf(&b, "location = %q\ninsecure = %v\n", at, s.plain())
			continue
		}
		fmt.Fprintf(&b, "location = %q\n[[registry.mirror]]\nlocation = %q\ninsecure = %v\npull-from-mirror = \"all\"\n", r, at, s.plain())
	}
	return []file{{containersConf, b.Bytes()}}, nil
}

// onlyOurs is for files that have nothing but what was installed.
func onlyOurs(string, []byte, []string) ([]byte, error) {
	return nil, fmt.Errorf("%w: take what you want to keep to a file of your own, and remove it", errTheirs)
}

// dockerFiles is daemon.json with the agent's listener for Docker first in registry-mirrors.
func dockerFiles(n node, s Settings) ([]file, error) {
	if s.DockerHub == "" {
		return nil, fmt.Errorf("%w: the agent has no listener that stands for docker.io: set docker_hub.listen in its configuration (Docker mirrors Docker Hub only, and names no registry)", errLeftOut)
	}
	if s.NoFallback {
		return nil, fmt.Errorf("%w: Docker always falls back to Docker Hub", errLeftOut)
	}
	doc := map[string]any{}
	text, err := n.read(daemonJSON)
	if err != nil {
		return nil, err
	}
	if len(bytes.TrimSpace(text)) > 0 {
		if err := json.Unmarshal(text, &doc); err != nil {
			return nil, fmt.Errorf("%s: %w", daemonJSON, err)
		}
		if doc == nil { // it says null
			doc = map[string]any{}
		}
	}
	mirrors := []any{s.DockerHub}
	old, _ := doc["registry-mirrors"].([]any)
	for _, m := range old {
		if m, ok := m.(string); !ok || strings.TrimSuffix(m, "/") != s.DockerHub {
			mirrors = append(mirrors, m)
		}
	}
	if len(old) == len(mirrors) && len(old) > 0 && old[0] == mirrors[0] {
		return []file{{daemonJSON, text}}, nil
	}
	doc["registry-mirrors"] = mirrors
	out, err := json.MarshalIndent(doc, "", "  ")
	return []file{{daemonJSON, append(out, '\n')}}, err
}

// dockerWithout takes the agent out of registry-mirrors.
func dockerWithout(_ string, text []byte, ours []string) ([]byte, error) {
	doc := map[string]any{}
	if err := json.Unmarshal(text, &doc); err != nil {
		return nil, err
	}
	mirrors, _ := doc["registry-mirrors"].([]any)
	rest := but(mirrors, ours)
	switch {
	case len(rest) == len(mirrors):
		return text, nil
	case len(rest) == 0:
		delete(doc, "registry-mirrors")
	default:
		doc["registry-mirrors"] = rest
	}
	out, err := json.MarshalIndent(doc, "", "  ")
	return append(out, '\n'), err
}

// but returns a list without some URLs.
func but(list []any, urls []string) []any {
	return slices.DeleteFunc(slices.Clone(list), func(e any) bool {
		u, ok := e.(string)
		return ok && slices.Contains(urls, strings.TrimSuffix(u, "/"))
	})
}

// rancherFiles returns what makes registries.yaml, from which k3s and RKE2 make certs.d at each start.
func rancherFiles(dir string) func(node, Settings) ([]file, error) {
	return func(n node, s Settings) ([]file, error) {
		name := path.Join(dir, "registries.yaml")
		text, err := n.read(name)
		if err != nil {
			return nil, err
		}
		doc := map[string]any{}
		if err := yaml.Unmarshal(text, &doc); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if doc == nil { // an empty file
			doc = map[string]any{}
		}
		mirrors, _ := doc["mirrors"].(map[string]any)
		if mirrors == nil {
			mirrors = map[string]any{}
		}
		registries, done := s.Registries, true
		if len(registries) == 0 {
			registries = []string{"*"}
		}
		for _, r := range registries {
			m, _ := mirrors[r].(map[string]any)
			if m == nil {
				m = map[string]any{}
			}
			endpoints, _ := m["endpoint"].([]any)
			if len(endpoints) > 0 && endpoints[0] == s.Agent {
				continue
			}
			done = false
			endpoints = slices.DeleteFunc(slices.Clone(endpoints), func(e any) bool { return e == s.Agent })
			m["endpoint"] = append([]any{s.Agent}, endpoints...)
			mirrors[r] = m
		}
		var only []file
		if s.NoFallback {
			only = []file{{path.Join(dir, "config.yaml.d", "50-kraken.yaml"), []byte(noDefaultEndpoint)}}
		}
		if done {
			return append([]file{{name, text}}, only...), nil
		}
		doc["mirrors"] = mirrors
		out, err := yaml.Marshal(doc)
		if err == nil {
			err = yaml.Unmarshal(out, &map[string]any{})
		}
		if err != nil {
			return nil, fmt.Errorf("%s has a form to which no mirror is added here: %w; put %q first among its endpoints by hand", name, err, s.Agent)
		}
		return append([]file{{name, out}}, only...), err
	}
}

// noDefaultEndpoint makes k3s and RKE2 ask no registry itself for what has a mirror.
const noDefaultEndpoint = made + "disable-default-registry-endpoint: true\n"

// rancherWithout takes the agent out of the endpoints of registries.yaml.
func rancherWithout(name string, text []byte, ours []string) ([]byte, error) {
	if path.Base(name) != "registries.yaml" {
		return onlyOurs(name, text, ours)
	}
	doc := map[string]any{}
	if err := yaml.Unmarshal(text, &doc); err != nil {
		return nil, err
	}
	mirrors, _ := doc["mirrors"].(map[string]any)
	found := false
	for r, v := range mirrors {
		m, _ := v.(map[string]any)
		endpoints, _ := m["endpoint"].([]any)
		rest := but(endpoints, ours)
		if len(rest) == len(endpoints) {
			continue
		}
		found = true
		m["endpoint"] = rest
		if len(rest) == 0 {
			delete(m, "endpoint")
		}
		if len(m) == 0 {
			delete(mirrors, r)
		}
	}
	if !found {
		return text, nil
	}
	if len(mirrors) == 0 {
		delete(doc, "mirrors")
	}
	if len(doc) == 0 {
		return nil, nil
	}
	return yaml.Marshal(doc)
}

// buildkitFiles is buildkitd.toml with the agent as first mirror of each registry. BuildKit sends ?ns=.
func buildkitFiles(n node, s Settings) ([]file, error) {
	text, err := n.read(buildkitdTOML)
	if err != nil {
		return nil, err
	}
	doc := map[string]any{}
	if err := toml.Unmarshal(text, &doc); err != nil {
		return nil, fmt.Errorf("%s: %w", buildkitdTOML, err)
	}
	at, out := s.hostPort(), string(text)
	if out != "" && !strings.HasSuffix(out, "\n") {
		out += "\n"
	}
	for _, r := range s.listed() {
		mirrors, _ := lookUp(doc, "registry", r, "mirrors").([]any)
		switch {
		case len(mirrors) > 0 && mirrors[0] == at:
		case lookUp(doc, "registry", r) != nil:
			return nil, fmt.Errorf("%s has a [registry.%q] of its own: put %q first in its mirrors by hand, or leave %s out with --registries", buildkitdTOML, r, at, r)
		default:
			out += fmt.Sprintf("\n[registry.%q]\n  mirrors = [%q]\n", r, at)
		}
	}
	if s.plain() && lookUp(doc, "registry", at) == nil {
		out += fmt.Sprintf("\n[registry.%q]\n  http = true\n", at)
	}
	if err := toml.Unmarshal([]byte(out), &doc); err != nil {
		return nil, fmt.Errorf("%s has a form to which no registry is added here: %w; put %q into the mirrors of each by hand", buildkitdTOML, err, at)
	}
	return []file{{buildkitdTOML, []byte(out)}}, nil
}

// buildkitWithout takes out the tables that buildkitFiles adds.
func buildkitWithout(_ string, text []byte, ours []string) ([]byte, error) {
	for _, o := range ours {
		_, at, _ := strings.Cut(o, "://")
		at = regexp.QuoteMeta(at)
		table := regexp.MustCompile(`(?m)\n?^\[registry\."[^"\n]*"\]\n  mirrors = \["` + at + `"\]\n|\n?^\[registry\."` + at + `"\]\n  http = true\n`)
		text = table.ReplaceAll(text, nil)
	}
	return text, nil
}
