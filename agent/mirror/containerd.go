package mirror

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
)

const (
	containerdConfig = "/etc/containerd/config.toml"
	certsD           = "/etc/containerd/certs.d"
	made             = "# Made by `kraken-agent mirror install`; `kraken-agent mirror uninstall` restores what was here.\n"
)

// Tables of containerd's configuration in which config_path is: of the CRI plugin before and since 2.0, and of the
// transfer service.
var (
	criRegistry1 = []string{"plugins", "io.containerd.grpc.v1.cri", "registry"}
	criRegistry2 = []string{"plugins", "io.containerd.cri.v1.images", "registry"}
	transfer     = []string{"plugins", "io.containerd.transfer.v1.local"}
)

func hasContainerd(n node) bool {
	// these have their own
	rancher := n.has("/etc/rancher/k3s", "/var/lib/rancher/k3s", "/etc/rancher/rke2", "/var/lib/rancher/rke2")
	return n.has(containerdConfig) || !rancher && n.has("/usr/bin/containerd", "/usr/local/bin/containerd")
}

// version is containerd's; the zero value is unknown, and takes nothing for granted.
type version struct{ major, minor int }

func (v version) atLeast(major, minor int) bool {
	return v.major > major || v.major == major && v.minor >= minor
}

func (v version) String() string {
	if v == (version{}) {
		return "of an unknown version"
	}
	return fmt.Sprintf("%d.%d", v.major, v.minor)
}

var versionPattern = regexp.MustCompile(`\bv?(\d+)\.(\d+)(\.\d+)?`)

// containerdVersion asks the node's containerd for its version.
func containerdVersion(n node, s Settings) version {
	text := s.ContainerdVersion
	for _, p := range []string{"/usr/local/bin/containerd", "/usr/bin/containerd"} {
		if text != "" || !n.has(p) {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		out, err := exec.CommandContext(ctx, n.at(p), "--version").Output()
		cancel()
		if err == nil {
			text = string(out)
		}
	}
	m := versionPattern.FindStringSubmatch(text)
	if m == nil {
		return version{}
	}
	major, err1 := strconv.Atoi(m[1])
	minor, err2 := strconv.Atoi(m[2])
	if err1 != nil || err2 != nil {
		return version{}
	}
	return version{major, minor}
}

// containerdFiles are hosts.toml, for all registries or for each, and config.toml where that would not use it.
func containerdFiles(n node, s Settings) ([]file, error) {
	v := containerdVersion(n, s)
	config, dir, err := containerdConfigFile(n, v)
	if err != nil {
		return nil, err
	}
	folders := []string{"_default"}
	if len(s.Registries) > 0 {
		folders = nil
		for _, r := range s.Registries {
			folders = append(folders, folderOf(n, dir, r))
		}
	}
	var out []file
	for _, f := range folders {
		out = append(out, file{path.Join(dir, f, "hosts.toml"), hostsTOML(s, v)})
	}
	if config != nil {
		out = append(out, *config)
	}
	return out, nil
}

// folderOf is the folder of a registry below certs.d. containerd looks for host_port_ before host:port.
func folderOf(n node, dir, registry string) string {
	if host, port, ok := strings.Cut(registry, ":"); ok {
		if other := host + "_" + port + "_"; n.has(path.Join(dir, other)) {
			return other
		}
	}
	return registry
}

// hostsTOML is the agent first, and the registry itself after it, unless there is to be no fall-back.
func hostsTOML(s Settings, v version) []byte {
	var b bytes.Buffer
	b.WriteString(made)
	if s.NoFallback {
		fmt.Fprintf(&b, "server = %q\n\n", s.Agent)
	}
	capabilities := []string{"pull", "resolve"}
	if v.atLeast(2, 2) {
		capabilities = append(capabilities, "referrers")
	}
	fmt.Fprintf(&b, "[host.%q]\n  capabilities = [\"%s\"]\n  dial_timeout = \"200ms\"\n", s.Agent, strings.Join(capabilities, `", "`))
	return b.Bytes()
}

// lookUp returns a value of decoded TOML.
func lookUp(doc map[string]any, keys ...string) any {
	var at any = doc
	for _, k := range keys {
		m, ok := at.(map[string]any)
		if !ok {
			return nil
		}
		at = m[k]
	}
	return at
}

// containerdConfigFile returns config.toml where it must be another for hosts.toml to be read, else nil, and the folder
// that config_path names.
func containerdConfigFile(n node, v version) (*file, string, error) {
	text, err := n.read(containerdConfig)
	if err != nil {
		return nil, "", err
	}
	doc := map[string]any{}
	if err := toml.Unmarshal(text, &doc); err != nil {
		return nil, "", fmt.Errorf("%s: %w", containerdConfig, err)
	}
	if legacy := legacyKeys(doc); len(legacy) > 0 {
		return nil, "", fmt.Errorf("%s has %s, beside which containerd refuses config_path: take them out first", containerdConfig, strings.Join(legacy, ", "))
	}
	cri, two := criTable(doc, v)
	tables := [][]string{cri}
	if two {
		tables = append(tables, transfer)
	}
	dir := certsD
	if p, ok := lookUp(doc, append(slices.Clone(cri), "config_path")...).(string); ok && p != "" {
		dir, _, _ = strings.Cut(p, ":")
	}
	is := text
	for _, t := range tables {
		if p, ok := lookUp(doc, append(slices.Clone(t), "config_path")...).(string); ok && p == dir {
			continue
		}
		is = setConfigPath(is, t, dir)
	}
	if bytes.Equal(is, text) {
		return nil, dir, nil
	}
	if len(text) == 0 {
		is = append([]byte("version = 2\n"), is...)
		if two {
			is = bytes.Replace(is, []byte("version = 2"), []byte("version = 3"), 1)
		}
	}
	after := map[string]any{}
	err = toml.Unmarshal(is, &after)
	for _, t := range tables {
		if p, ok := lookUp(after, append(slices.Clone(t), "config_path")...).(string); !ok || p != dir {
			err = errors.Join(err, fmt.Errorf("can't set config_path = %q in [%s]", dir, tableName(t)))
		}
	}
	if err != nil {
		return nil, "", fmt.Errorf("%s has a form that is not edited here: %w; set it by hand", containerdConfig, err)
	}
	return &file{containerdConfig, is}, dir, nil
}

// criTable returns the table of the CRI plugin's registries, and whether there is a transfer service that pulls for it.
func criTable(doc map[string]any, v version) (table []string, two bool) {
	switch version, _ := doc["version"].(int64); {
	case version >= 3:
		return criRegistry2, true
	case len(doc) > 0:
		return criRegistry1, v.atLeast(2, 1)
	}
	if v.atLeast(2, 0) {
		return criRegistry2, true
	}
	return criRegistry1, false
}

// legacyKeys are those beside which config_path is refused.
func legacyKeys(doc map[string]any) (out []string) {
	for _, t := range [][]string{criRegistry1, criRegistry2} {
		for _, k := range []string{"mirrors", "configs"} {
			if m, ok := lookUp(doc, append(slices.Clone(t), k)...).(map[string]any); ok && len(m) > 0 {
				out = append(out, "["+tableName(append(slices.Clone(t), k))+"]")
			}
		}
	}
	return out
}

func tableName(keys []string) string {
	var out []string
	for _, k := range keys {
		if strings.Contains(k, ".") {
			k = `"` + k + `"`
		}
		out = append(out, k)
	}
	return strings.Join(out, ".")
}

// setConfigPath sets config_path in a table, and leaves every other line as it is: the line that sets it is replaced,
// one is added below the table's header, or a table at the end.
func setConfigPath(text []byte, table []string, dir string) []byte {
	line := fmt.Sprintf("config_path = %q", dir)
	var lines []string
	if len(text) > 0 {
		lines = strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	}
	header := slices.IndexFunc(lines, func(l string) bool { return isHeader(l, table) })
	if header < 0 {
		lines = append(lines, "", "["+tableName(table)+"]", "  "+line)
		return []byte(strings.Join(lines, "\n") + "\n")
	}
	for i := header + 1; i < len(lines) && !strings.HasPrefix(strings.TrimSpace(lines[i]), "["); i++ {
		if l := lines[i]; configPathLine.MatchString(l) {
			lines[i] = l[:len(l)-len(strings.TrimLeft(l, " \t"))] + line
			return []byte(strings.Join(lines, "\n") + "\n")
		}
	}
	lines = slices.Insert(lines, header+1, "  "+line)
	return []byte(strings.Join(lines, "\n") + "\n")
}

var configPathLine = regexp.MustCompile(`^\s*config_path\s*=`)

// isHeader reports whether a line is the header of a table, in any quotes.
func isHeader(line string, table []string) bool {
	line, _, _ = strings.Cut(line, "#")
	line = strings.TrimSpace(strings.ReplaceAll(strings.ReplaceAll(line, "'", `"`), " ", ""))
	return line == "["+tableName(table)+"]"
}
