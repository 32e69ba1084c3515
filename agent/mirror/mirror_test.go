package mirror

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/pelletier/go-toml/v2"
)

const agentURL = "http://127.0.0.1:16061"

func settings(root string) Settings {
	return Settings{Root: root, Agent: agentURL, DockerHub: "http://127.0.0.1:16064", Own: []string{"kraken.example"}, ContainerdVersion: "1.6"}
}

// plant makes a node of files.
func plant(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		if err := os.MkdirAll(filepath.Join(root, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// tree is all files of a node.
func tree(t *testing.T, root string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil || rel == "." {
			return err
		}
		if e.IsDir() {
			out["/"+rel+"/"] = ""
			return nil
		}
		b, err := os.ReadFile(p)
		out["/"+rel] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

const (
	oldConfig = "version = 2\n# of the distribution\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"x\"\n  [plugins.\"io.containerd.grpc.v1.cri\".registry]\n"
	newConfig = "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = '/etc/containerd/certs.d:/etc/docker/certs.d' # as it comes\n[plugins.'io.containerd.transfer.v1.local']\n  config_path = '/etc/containerd/certs.d:/etc/docker/certs.d'\n"
)

var everything = map[string]string{
	"/etc/containerd/config.toml":       oldConfig,
	"/etc/containers/policy.json":       "{}",
	"/etc/docker/daemon.json":           `{"data-root": "/d", "registry-mirrors": ["https://mirror.corp"]}`,
	"/etc/rancher/k3s/registries.yaml":  "mirrors:\n  docker.io:\n    endpoint: [\"https://mirror.corp\"]\nconfigs:\n  x: {auth: {username: u}}\n",
	"/etc/rancher/rke2/config.yaml":     "",
	"/etc/buildkit/buildkitd.toml":      "debug = true\n",
	"/etc/containerd/certs.d/own/other": "somebody else's\n",
}

// What is installed says the same again, and uninstall restores every file and folder.
func TestInstallAndUninstall(t *testing.T) {
	for name, change := range map[string]func(*Settings){
		"all": func(*Settings) {}, "some": func(s *Settings) { s.Registries = []string{"docker.io", "registry.corp:5000"} },
		"without fall-back": func(s *Settings) {
			s.NoFallback, s.Runtimes = true, []string{"containerd", "containers", "k3s", "rke2", "buildkit"}
		},
		"containerd 2.2": func(s *Settings) { s.ContainerdVersion = "2.2.1" },
	} {
		t.Run(name, func(t *testing.T) {
			root := plant(t, everything)
			before := tree(t, root)
			s := settings(root)
			change(&s)
			dry := s
			dry.DryRun = true
			var out bytes.Buffer
			if err := Install(dry, &out); err != nil {
				t.Fatal(err)
			}
			if !maps.Equal(tree(t, root), before) || !strings.Contains(out.String(), "hosts.toml would be") {
				t.Fatalf("a dry run changed something, or does not say what it would:\n%s", &out)
			}
			if err := Install(s, &out); err != nil {
				t.Fatal(err)
			}
			installed := tree(t, root)
			again := bytes.Buffer{}
			if err := Install(s, &again); err != nil {
				t.Fatal(err)
			}
			if !maps.Equal(tree(t, root), installed) || strings.Contains(again.String(), "wrote") {
				t.Errorf("the second installation is not the first:\n%s", &again)
			}
			s.Agent = "http://127.0.0.1:7" // the agent has moved, and mirrors less
			s.Registries = []string{"quay.io"}
			if err := Install(s, &out); err != nil {
				t.Fatal(err)
			}
			for name, text := range tree(t, root) {
				if strings.Contains(text, agentURL) && name != keptPath {
					t.Errorf("after the agent has moved %s names it where it was:\n%s", name, text)
				}
			}
			if err := Uninstall(s, &out); err != nil {
				t.Fatal(err)
			}
			delete(before, "/var/lib/kraken/")
			after := tree(t, root)
			delete(after, "/var/")
			delete(after, "/var/lib/")
			delete(after, "/var/lib/kraken/")
			if !maps.Equal(after, before) {
				t.Errorf("it is not what it was:\n%v\n%v", slices.Sorted(maps.Keys(after)), slices.Sorted(maps.Keys(before)))
			}
			if err := Uninstall(s, &out); err != nil {
				t.Error(err)
			}
		})
	}
}

// Each file says what its runtime needs, and keeps what it said.
func TestWhatIsInstalled(t *testing.T) {
	root := plant(t, everything)
	var out bytes.Buffer
	if err := Install(settings(root), &out); err != nil {
		t.Fatal(err)
	}
	got := tree(t, root)
	parse := func(name string, unmarshal func([]byte, any) error) map[string]any {
		t.Helper()
		doc := map[string]any{}
		if err := unmarshal([]byte(got[name]), &doc); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, got[name])
		}
		return doc
	}
	decode := func(b []byte, v any) error { return toml.Unmarshal(b, v) }
	hosts := parse("/etc/containerd/certs.d/_default/hosts.toml", decode)
	if lookUp(hosts, "server") != nil || lookUp(hosts, "host", agentURL, "dial_timeout") != "200ms" || strings.Contains(got["/etc/containerd/certs.d/_default/hosts.toml"], "referrers") {
		t.Errorf("hosts.toml: %v", hosts)
	}
	config := parse("/etc/containerd/config.toml", decode)
	if lookUp(config, append(criRegistry1, "config_path")...) != certsD || lookUp(config, "plugins", "io.containerd.grpc.v1.cri", "sandbox_image") != "x" || !strings.Contains(got["/etc/containerd/config.toml"], "# of the distribution") {
		t.Errorf("config.toml:\n%s", got["/etc/containerd/config.toml"])
	}
	if text := got[containersConf]; !strings.Contains(text, `location = "127.0.0.1:16061/docker.io"`) || !strings.Contains(text, `location = "127.0.0.1:16061/kraken.example"`) {
		t.Errorf("registries.conf.d: %s", text)
	}
	docker := parse(daemonJSON, func(b []byte, v any) error { return yaml.Unmarshal(b, v) })
	if m, _ := docker["registry-mirrors"].([]any); len(m) != 2 || m[0] != "http://127.0.0.1:16064" || docker["data-root"] != "/d" {
		t.Errorf("daemon.json: %v", docker)
	}
	k3s := parse("/etc/rancher/k3s/registries.yaml", func(b []byte, v any) error { return yaml.Unmarshal(b, v) })
	if e, _ := lookUp(k3s, "mirrors", "*", "endpoint").([]any); len(e) != 1 || e[0] != agentURL || lookUp(k3s, "mirrors", "docker.io", "endpoint") == nil || lookUp(k3s, "configs", "x") == nil {
		t.Errorf("registries.yaml: %v", k3s)
	}
	buildkit := parse(buildkitdTOML, decode)
	if lookUp(buildkit, "registry", "127.0.0.1:16061", "http") != true || buildkit["debug"] != true {
		t.Errorf("buildkitd.toml: %v", buildkit)
	}
}

func write(t *testing.T, root, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// What somebody has said of a registry stays beside the agent, and so does what is said later.
func TestHostsOfOthersStay(t *testing.T) {
	for _, agent := range []string{agentURL, "http://localhost:16061", "http://[::1]:16061"} {
		t.Run(agent, func(t *testing.T) { hostsOfOthersStay(t, agent) })
	}
}

func hostsOfOthersStay(t *testing.T, agent string) {
	const name = certsD + "/registry.corp:5000/hosts.toml"
	own := "# ours\nserver = \"https://registry.corp:5000\"\n\n[host.\"https://registry.corp:5000\"]\n  ca = \"/etc/corp.crt\"\n"
	root := plant(t, map[string]string{containerdConfig: oldConfig, name: own})
	s := settings(root)
	s.Agent, s.Registries, s.Runtimes = agent, []string{"registry.corp:5000"}, []string{"containerd"}
	check := func(what string, want ...string) {
		t.Helper()
		text := tree(t, root)[name]
		var f hostsFile
		if err := toml.Unmarshal([]byte(text), &f); err != nil {
			t.Fatalf("%s: %v\n%s", what, err, text)
		}
		at := -1
		for _, w := range want {
			if i := strings.Index(text, w); i <= at {
				t.Errorf("%s: %q is not where it has to be in\n%s", what, w, text)
			} else {
				at = i
			}
		}
	}
	install := func(what string, want ...string) {
		t.Helper()
		if err := Install(s, &bytes.Buffer{}); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		check(what, want...)
	}
	install("first", "server = ", agent, "corp.crt")
	write(t, root, name, tree(t, root)[name]+"\n[host.\"https://second.corp\"]\n")
	s.Agent = "http://127.0.0.1:7"
	install("after a change, and the agent has moved", "server = ", s.Agent, "corp.crt", "second.corp")
	if text := tree(t, root)[name]; strings.Contains(text, agent) || strings.Count(text, made) != 1 {
		t.Errorf("it names the agent where it was, or says twice who made it:\n%s", text)
	}
	if err := Uninstall(s, &bytes.Buffer{}); err != nil {
		t.Fatal(err)
	}
	check("uninstalled", "# ours", "server = ", "corp.crt", "second.corp")
	if text := tree(t, root)[name]; strings.Contains(text, s.Agent) {
		t.Errorf("uninstalled, it names the agent:\n%s", text)
	}
}

// Of a file that was changed after an installation, the next one and Uninstall touch only what is theirs.
func TestChangesBetween(t *testing.T) {
	for _, c := range []struct {
		runtime, name, was string
		change             [2]string
		keeps              []string
	}{
		{"docker", daemonJSON, "{}\n", [2]string{"{", "{\n  \"data-root\": \"/srv\","}, []string{`"data-root": "/srv"`}},
		{"k3s", "/etc/rancher/k3s/registries.yaml", "configs:\n  x: {}\n", [2]string{"configs:", "configs:\n  z: {}"}, []string{"z:", "x:"}},
		{"buildkit", buildkitdTOML, "debug = true\n", [2]string{"debug", "trace = true\ndebug"}, []string{"trace = true", "debug = true"}},
	} {
		for _, again := range []bool{false, true} {
			root := plant(t, map[string]string{c.name: c.was})
			s := settings(root)
			s.Runtimes = []string{c.runtime}
			if err := Install(s, &bytes.Buffer{}); err != nil {
				t.Fatal(err)
			}
			write(t, root, c.name, strings.Replace(tree(t, root)[c.name], c.change[0], c.change[1], 1))
			if again {
				s.Agent, s.DockerHub = "http://127.0.0.1:7", "http://127.0.0.1:8"
				if err := Install(s, &bytes.Buffer{}); err != nil {
					t.Fatal(err)
				}
				if text := tree(t, root)[c.name]; strings.Contains(text, "1606") {
					t.Errorf("%s: after the agent has moved it is named where it was:\n%s", c.runtime, text)
				}
			}
			err := Uninstall(s, &bytes.Buffer{})
			text := tree(t, root)[c.name]
			for _, k := range c.keeps {
				if !strings.Contains(text, k) {
					t.Errorf("%s, installed again %v: %q has gone (%v):\n%s", c.runtime, again, k, err, text)
				}
			}
			if err != nil || strings.Contains(text, "127.0.0.1") {
				t.Errorf("%s, installed again %v: %v:\n%s", c.runtime, again, err, text)
			}
		}
	}
}

// A link stays one, as the node sees it, and what it names is changed.
func TestLinks(t *testing.T) {
	for _, to := range []string{"../../usr/share/daemon.json", "/usr/share/daemon.json"} {
		root := plant(t, map[string]string{"/usr/share/daemon.json": "{}\n", "/etc/docker/x": ""})
		link := filepath.Join(root, daemonJSON)
		if err := os.Symlink(to, link); err != nil {
			t.Fatal(err)
		}
		s := settings(root)
		s.Runtimes = []string{"docker"}
		for _, step := range []struct {
			do        func(Settings, io.Writer) error
			installed bool
		}{{Install, true}, {Uninstall, false}} {
			if err := step.do(s, &bytes.Buffer{}); err != nil {
				t.Fatal(err)
			}
			if is, err := os.Readlink(link); err != nil || is != to {
				t.Errorf("%s: the link is %q, %v", to, is, err)
			}
			b, err := os.ReadFile(filepath.Join(root, "/usr/share/daemon.json"))
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(b), "16064") != step.installed {
				t.Errorf("%s, installed %v: %s", to, step.installed, b)
			}
		}
	}
}

// containerd's own default, a list, is made one path in both places; a new config.toml has the version's form.
func TestConfigPathOfContainerd2(t *testing.T) {
	for name, text := range map[string]string{"a list": newConfig, "none": ""} {
		root := plant(t, map[string]string{"/usr/bin/containerd": "", "/etc/containerd/config.toml": text})
		s := settings(root)
		s.ContainerdVersion = "2.4.2"
		if err := Install(s, &bytes.Buffer{}); err != nil {
			t.Fatal(err)
		}
		got := tree(t, root)
		doc := map[string]any{}
		if err := toml.Unmarshal([]byte(got[containerdConfig]), &doc); err != nil {
			t.Fatal(err)
		}
		if lookUp(doc, append(slices.Clone(criRegistry2), "config_path")...) != certsD || lookUp(doc, append(slices.Clone(transfer), "config_path")...) != certsD || lookUp(doc, "version") != int64(3) {
			t.Errorf("%s:\n%s", name, got[containerdConfig])
		}
		if !strings.Contains(got[certsD+"/_default/hosts.toml"], `"referrers"`) {
			t.Errorf("%s: 2.2 and later know referrers", name)
		}
	}
}

// A config.toml without a version is of the first one, in which plugins have other names.
func TestConfigWithoutVersion(t *testing.T) {
	for name, c := range map[string]struct{ text, want, fails string }{
		"comments only":              {"# mine\n", "version = 2\n# mine\n", ""},
		"settings of no plugin":      {"root = \"/x\"\n", "version = 2\nroot = \"/x\"\n", ""},
		"Docker's, without CRI":      {"disabled_plugins = [\"cri\"]\n", "disabled_plugins = [\"cri\"]\n", ""},
		"plugins by short names":     {"[plugins.cri]\nsandbox_image = \"x\"\n", "", "version 1"},
		"it says so":                 {"version = 1\n", "", "version 1"},
		"other plugins are left out": {"disabled_plugins = [\"btrfs\"]\n", "", "version 1"},
	} {
		root := plant(t, map[string]string{containerdConfig: c.text})
		s := settings(root)
		s.Runtimes = []string{"containerd"}
		err := Install(s, &bytes.Buffer{})
		if (err == nil) != (c.fails == "") || err != nil && !strings.Contains(err.Error(), c.fails) {
			t.Errorf("%s: %v", name, err)
		}
		if text := tree(t, root)[containerdConfig]; err == nil && !strings.HasPrefix(text, c.want) {
			t.Errorf("%s:\n%s", name, text)
		}
	}
}

// What somebody has changed since is theirs.
func TestUninstallLeavesWhatWasChanged(t *testing.T) {
	root := plant(t, map[string]string{"/etc/containers/policy.json": "{}"})
	s := settings(root)
	if err := Install(s, &bytes.Buffer{}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, containersConf), []byte("# mine\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	err := Uninstall(s, &bytes.Buffer{})
	if err == nil || !strings.Contains(err.Error(), containersConf) || tree(t, root)[containersConf] != "# mine\n" {
		t.Errorf("%v, %q", err, tree(t, root)[containersConf])
	}
}

func TestInstallRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		files  map[string]string
		change func(*Settings)
		want   string
	}{
		"no runtime":                  {nil, nil, "no runtime was found"},
		"legacy keys":                 {map[string]string{containerdConfig: "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"docker.io\"]\nendpoint = [\"x\"]\n"}, nil, "mirrors"},
		"broken TOML":                 {map[string]string{containerdConfig: "version = "}, nil, containerdConfig},
		"a form that is not edited":   {map[string]string{containerdConfig: "version = 2\n[plugins]\n\"io.containerd.grpc.v1.cri\" = {registry = {config_path = \"\"}}\n"}, nil, "by hand"},
		"Docker without its listener": {map[string]string{daemonJSON: "{}"}, func(s *Settings) { s.DockerHub, s.Runtimes = "", []string{"docker"} }, "docker_hub.listen"},
		"an unknown runtime":          {nil, func(s *Settings) { s.Runtimes = []string{"rkt"} }, "rkt"},
		"a registry that is none":     {nil, func(s *Settings) { s.Registries = []string{"https://x"} }, "no name of a registry"},
	} {
		root := plant(t, c.files)
		s := settings(root)
		if c.change != nil {
			c.change(&s)
		}
		if err := Install(s, &bytes.Buffer{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestExplain(t *testing.T) {
	for _, p := range Platforms {
		var out bytes.Buffer
		if err := Explain(p, settings(""), &out); err != nil || !strings.Contains(out.String(), agentURL) {
			t.Errorf("%s: %v\n%s", p, err, &out)
		}
	}
	if err := Explain("mainframe", settings(""), &bytes.Buffer{}); err == nil {
		t.Error("an unknown platform is explained")
	}
}

// A root that is not there is an error, and no node's.
func TestRootThatIsNotThere(t *testing.T) {
	s := settings(filepath.Join(t.TempDir(), "none"))
	s.Runtimes = []string{"containerd"}
	for what, f := range map[string]func(Settings, io.Writer) error{"install": Install, "uninstall": Uninstall} {
		if err := f(s, io.Discard); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v, want that it does not exist", what, err)
		}
	}
}
