package mirror

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path"
	"reflect"
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
		name := path.Join(dir, f, "hosts.toml")
		text, err := n.read(name)
		if err != nil {
			return nil, err
		}
		if text, err = hostsTOML(s, v, text); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		out = append(out, file{name, text})
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

// agentHost is the table of the agent in hosts.toml.
func agentHost(s Settings, v version) string {
	capabilities := []string{"pull", "resolve"}
	if v.atLeast(2, 2) {
		capabilities = append(capabilities, "referrers")
	}
	return fmt.Sprintf("[host.%q]\n  capabilities = [\"%s\"]\n  dial_timeout = \"200ms\"\n", s.Agent, strings.Join(capabilities, `", "`))
}

// newHostsTOML is the agent, and the registry itself after it, unless there is to be no fall-back.
func newHostsTOML(s Settings, v version) []byte {
	if s.NoFallback {
		return fmt.Appendf(nil, "%sserver = %q\n\n%s", made, s.Agent, agentHost(s, v))
	}
	return []byte(made + agentHost(s, v))
}

// hostsTOML is what a hosts.toml says, with the agent before the hosts that it names. Without fall-back it is the agent
// alone.
func hostsTOML(s Settings, v version, text []byte) ([]byte, error) {
	if s.NoFallback || len(text) == 0 {
		return newHostsTOML(s, v), nil
	}
	head, tables := splitTOML(string(text))
	if tables != "" {
		tables = "\n" + tables
	}
	out := []byte(made + head + agentHost(s, v) + tables)
	var f hostsFile
	if err := toml.Unmarshal(out, &f); err != nil || f.Hosts[s.Agent] == nil {
		return nil, fmt.Errorf("it has a form to which no host is added here: %w; put %q first by hand", cmp.Or(err, errors.New("the host is not in it")), s.Agent)
	}
	return out, nil
}

// splitTOML returns what is before the first table of a document, and the tables.
func splitTOML(text string) (head, tables string) {
	at := regexp.MustCompile(`(?m)^\s*\[`).FindStringIndex(text)
	if at == nil {
		return text, ""
	}
	return text[:at[0]], text[at[0]:]
}

// containerdWithout takes the agent's tables out of hosts.toml. config.toml is as it is: config_path names the folder
// of all hosts.
func containerdWithout(name string, text []byte, ours []string) ([]byte, error) {
	if path.Base(name) != "hosts.toml" {
		return text, nil
	}
	var out []string
	mine := false
	for _, line := range strings.SplitAfter(string(text), "\n") {
		if t := strings.TrimSpace(line); strings.HasPrefix(t, "[") {
			mine = slices.ContainsFunc(ours, func(o string) bool {
				table := []string{"host", o}
				return isHeader(t, table) || strings.HasPrefix(t, "["+tableName(table)+".")
			})
		}
		server := slices.ContainsFunc(ours, func(o string) bool { return strings.TrimSpace(line) == fmt.Sprintf("server = %q", o) })
		if !mine && !server && line != made {
			out = append(out, line)
		}
	}
	return []byte(strings.Join(out, "")), nil
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
	if err := firstVersion(doc); err != nil {
		return nil, "", fmt.Errorf("%s %w", containerdConfig, err)
	}
	cri, two := criTable(doc, v)
	if criDisabled(doc) { // config_path is CRI's; who else reads hosts.toml knows the folder
		return nil, certsD, nil
	}
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
	if _, said := doc["version"]; !said {
		line := "version = 2\n"
		if two {
			line = "version = 3\n"
		}
		is = append([]byte(line), is...)
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

// criDisabled reports whether containerd runs without its CRI plugin, as Docker's package has it.
func criDisabled(doc map[string]any) bool {
	plugins, _ := doc["disabled_plugins"].([]any)
	return slices.ContainsFunc(plugins, func(p any) bool { return p == "cri" || p == "io.containerd.grpc.v1.cri" })
}

// firstVersion returns an error for a config.toml of the first version, which names plugins in short: containerd 1.x
// takes one without a version for that, and looks for no plugin by its whole name.
func firstVersion(doc map[string]any) error {
	version, said := doc["version"].(int64)
	if said && version >= 2 || criDisabled(doc) {
		return nil
	}
	for _, k := range []string{"plugins", "disabled_plugins", "required_plugins"} {
		if n := reflect.ValueOf(doc[k]); n.IsValid() && n.Len() > 0 || said {
			return errors.New("is of version 1, in which plugins have other names, and which containerd 2 refuses: write it as version 2 first (containerd config migrate prints it)")
		}
	}
	return nil
}

// criTable returns the table of the CRI plugin's registries, and whether there is a transfer service that pulls for it.
func criTable(doc map[string]any, v version) (table []string, two bool) {
	switch version, _ := doc["version"].(int64); {
	case version >= 3:
		return criRegistry2, true
	case version == 2:
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

// bareKey is a key that TOML takes without quotes.
var bareKey = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)

// tableName returns a table's name as its header has it: keys that need quotes have double ones.
func tableName(keys []string) string {
	var out []string
	for _, k := range keys {
		if !bareKey.MatchString(k) {
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
