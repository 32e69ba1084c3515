package mirror

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// Kind says what is wrong.
type Kind string

// The kinds of findings.
const (
	ListConfigPath Kind = "config-path-list" // containerd 2.x takes a list for one path
	NoConfigPath   Kind = "no-config-path"   // hosts.toml is not read
	BrokenFile     Kind = "broken-file"      // TOML or JSON that can't be read disables the mirror without a word
	LegacyKeys     Kind = "legacy-keys"      // beside config_path: the CRI plugin refuses to load
	TLSOnPlain     Kind = "tls-on-plain"     // keys of TLS make containerd try HTTPS first
	NoFallback     Kind = "no-fallback"      // server is the agent, which is then a single point of failure
	WrongPort      Kind = "wrong-port"       // not the agent's
	AgentDown      Kind = "agent-down"       // nobody answers there
	BadCapability  Kind = "bad-capability"   // an unknown one disables the mirror without a word
	ProxyVariable  Kind = "proxy-variable"   // what is meant for the agent goes to a proxy
	WrongFolder    Kind = "wrong-folder"     // one that is never looked into
	NotUsed        Kind = "not-used"         // nothing names the agent
	OtherFirst     Kind = "other-first"      // a registry's own folder does not name the agent
	SecretsInReach Kind = "secrets-in-reach" // pull secrets go to a port that any user may bind
	Unknown        Kind = "unknown"          // what could not be found out
)

// Finding is one thing that is wrong, or, where Harmless, only to be known.
type Finding struct {
	Kind     Kind
	Where    string // a file, or what was asked
	Problem  string
	Remedy   string
	Harmless bool
}

func (f Finding) String() string {
	mark := "PROBLEM"
	if f.Harmless {
		mark = "note"
	}
	return fmt.Sprintf("%-8s%s: %s [%s]\n        %s", mark, f.Where, f.Problem, f.Kind, f.Remedy)
}

// diagnosis is what is found while it is looked for.
type diagnosis struct {
	node
	s        Settings
	version  version
	findings []Finding
	used     bool // some file names the agent
}

func (d *diagnosis) add(kind Kind, where, problem, remedy string) {
	d.findings = append(d.findings, Finding{Kind: kind, Where: where, Problem: problem, Remedy: remedy})
}

// Doctor looks for what keeps the runtimes of a node from asking the agent.
func Doctor(ctx context.Context, s Settings) ([]Finding, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	d := &diagnosis{node: node{root: s.Root}, s: s}
	if hasContainerd(d.node) {
		d.version = containerdVersion(d.node, s)
		if err := d.containerd(); err != nil {
			return nil, err
		}
	}
	if err := d.containers(); err != nil {
		return nil, err
	}
	if err := d.docker(); err != nil {
		return nil, err
	}
	if !d.used && len(d.findings) == 0 {
		d.add(NotUsed, "this node", "no runtime is set up to ask "+s.Agent, "kraken-agent mirror install")
	}
	if err := d.proxies(); err != nil {
		return nil, err
	}
	d.agent(ctx)
	return d.findings, nil
}

// containerd looks at config.toml and at every hosts.toml.
func (d *diagnosis) containerd() error {
	text, err := d.read(containerdConfig)
	if err != nil {
		return err
	}
	doc := map[string]any{}
	if err := toml.Unmarshal(text, &doc); err != nil {
		d.add(BrokenFile, containerdConfig, "is no TOML: "+err.Error(), "mend it")
		return nil
	}
	if legacy := legacyKeys(doc); len(legacy) > 0 {
		d.add(LegacyKeys, containerdConfig, strings.Join(legacy, ", ")+" beside config_path keep the CRI plugin from loading, and without config_path no hosts.toml is read", "take them out; kraken-agent mirror install writes hosts.toml in their place")
	}
	folders := d.configPaths(doc)
	if len(folders) == 0 {
		folders = []string{certsD}
	}
	seen := false
	for _, folder := range folders {
		entries, err := os.ReadDir(d.at(folder))
		if err != nil {
			continue // one of a list need not be there
		}
		for _, e := range entries {
			named, err := d.hosts(path.Join(folder, e.Name(), "hosts.toml"), e.Name())
			if err != nil {
				return err
			}
			seen = seen || named
		}
	}
	d.used = d.used || seen
	if !seen && len(d.findings) == 0 {
		d.add(NotUsed, strings.Join(folders, ", "), "no hosts.toml names "+d.s.Agent, "kraken-agent mirror install")
	}
	return nil
}

// configPaths checks config_path wherever containerd reads it, and returns the folders that it names.
func (d *diagnosis) configPaths(doc map[string]any) (folders []string) {
	cri, two := criTable(doc, d.version)
	two = two || d.version.atLeast(2, 1)
	tables := [][]string{cri}
	local, _ := lookUp(doc, append(slices.Clone(criRegistry2[:2]), "use_local_image_pull")...).(bool)
	if two && !local {
		tables = append(tables, transfer)
	}
	for _, t := range tables {
		p, set := lookUp(doc, append(slices.Clone(t), "config_path")...).(string)
		if !set && d.version.atLeast(2, 2) {
			p = certsD + ":/etc/docker/certs.d" // containerd's own default
		}
		where := containerdConfig + " [" + tableName(t) + "]"
		switch list := filepath.SplitList(p); {
		case len(list) == 0:
			d.add(NoConfigPath, where, "config_path is not set: hosts.toml is not read", fmt.Sprintf("config_path = %q, as kraken-agent mirror install writes it", certsD))
		case len(list) > 1 && (two || d.version == version{}) && !local:
			d.add(ListConfigPath, where, fmt.Sprintf("config_path = %q, containerd's own default, is a list, which containerd 2.x takes for one path: no mirror is used, and no line of its log says so", p),
				fmt.Sprintf("config_path = %q, as kraken-agent mirror install writes it, or use_local_image_pull = true", list[0]))
			folders = append(folders, list...)
		default:
			folders = append(folders, list...)
		}
	}
	slices.Sort(folders)
	return slices.Compact(folders)
}

// hostsFile is hosts.toml.
type hostsFile struct {
	Server string                    `toml:"server"`
	Hosts  map[string]map[string]any `toml:"host"`
}

// hosts looks at one hosts.toml, and reports whether it names the agent.
func (d *diagnosis) hosts(name, folder string) (named bool, err error) {
	text, err := d.read(name)
	if err != nil || text == nil {
		return false, err
	}
	var f hostsFile
	if err := toml.Unmarshal(text, &f); err != nil {
		d.add(BrokenFile, name, "is no TOML, so that containerd uses no mirror, and says so in its log only: "+err.Error(), "mend it, or kraken-agent mirror install")
		return false, nil
	}
	for host, keys := range f.Hosts {
		switch {
		case sameURL(host, d.s.Agent):
			named = true
			d.host(name, host, keys)
		case sameHost(host, d.s.Agent):
			d.add(WrongPort, name, fmt.Sprintf("names %s, and the agent is at %s", host, d.s.Agent), "kraken-agent mirror install")
			named = true
		}
	}
	if sameURL(f.Server, d.s.Agent) && !d.s.NoFallback {
		d.add(NoFallback, name, "server is the agent: while that is away nothing can be pulled from this registry", "leave server out, so that the registry itself comes last; or say --no-fallback, if it is meant")
		named = true
	}
	if named || d.mentions(text) {
		d.folder(name, folder)
	} else if folder != "_default" {
		d.findings = append(d.findings, Finding{OtherFirst, name, "does not name the agent, and comes before _default", "kraken-agent mirror install --registries " + folder + ", if the agent is to be asked", true})
	}
	return named, nil
}

// mentions reports whether a file is ours.
func (d *diagnosis) mentions(text []byte) bool { return strings.Contains(string(text), d.s.hostPort()) }

// knownCapabilities are those of containerd; referrers is one since 2.2.
var knownCapabilities = []string{"pull", "resolve", "push", "referrers"}

// host looks at what hosts.toml says of the agent.
func (d *diagnosis) host(name, host string, keys map[string]any) {
	list, isList := keys["capabilities"].([]any)
	if _, set := keys["capabilities"]; set && !isList {
		d.add(BadCapability, name, "capabilities is no list", `capabilities = ["pull", "resolve"]`)
	}
	for _, c := range list {
		text, _ := c.(string)
		early := text == "referrers" && !d.version.atLeast(2, 2)
		if !slices.Contains(knownCapabilities, text) || early {
			d.add(BadCapability, name, fmt.Sprintf("capability %q is not known to containerd %s, which then uses no mirror, and says so in its log only", fmt.Sprint(c), d.version), `capabilities = ["pull", "resolve"]`)
		}
	}
	if len(list) > 0 && !slices.Contains(list, any("pull")) {
		d.add(BadCapability, name, "without the capability pull the agent is not asked", `capabilities = ["pull", "resolve"]`)
	}
	for _, k := range []string{"ca", "client", "skip_verify"} {
		if _, set := keys[k]; set && strings.HasPrefix(host, "http://") {
			d.add(TLSOnPlain, name, fmt.Sprintf("%s at %s, which is plain HTTP, makes containerd try HTTPS first", k, host), "leave "+k+" out")
		}
	}
}

// otherNames are names under which nobody asks for Docker Hub's images.
var otherNames = []string{"index.docker.io", "registry-1.docker.io", "registry.hub.docker.com", "hub.docker.com", "auth.docker.io"}

var folderPattern = regexp.MustCompile(`^[a-z0-9.-]+(:[0-9]+|_[0-9]+_)?$`)

// folder looks at the name of a folder with a hosts.toml that is meant for the agent.
func (d *diagnosis) folder(name, folder string) {
	remedy := "name it as the registry in images: docker.io, or host:port, or _default for all"
	switch {
	case folder == "_default":
	case slices.Contains(otherNames, folder):
		d.add(WrongFolder, name, "images of Docker Hub are docker.io's: this folder is never looked into", "name it docker.io")
	case folder == "default", folder == "*", !folderPattern.MatchString(folder), !strings.ContainsAny(folder, ".:_") && folder != "localhost":
		d.add(WrongFolder, name, fmt.Sprintf("%s is the name of no registry: this folder is never looked into", folder), remedy)
	}
}

// containers looks at what Podman and CRI-O read.
func (d *diagnosis) containers() error {
	const dir = "/etc/containers/registries.conf.d"
	names := []string{"/etc/containers/registries.conf"}
	entries, _ := os.ReadDir(d.at(dir)) // it need not be there
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".conf") {
			names = append(names, path.Join(dir, e.Name()))
		}
	}
	for _, name := range names {
		text, err := d.read(name)
		if err != nil {
			return err
		}
		var f struct {
			Registry []struct {
				Location string `toml:"location"`
				Mirror   []struct {
					Location string `toml:"location"`
				} `toml:"mirror"`
			} `toml:"registry"`
		}
		if err := toml.Unmarshal(text, &f); err != nil {
			d.add(BrokenFile, name, "is no TOML: "+err.Error(), "mend it")
			continue
		}
		for _, r := range f.Registry {
			for _, m := range r.Mirror {
				at, _, _ := strings.Cut(m.Location, "/")
				switch {
				case at == d.s.hostPort():
					d.used = true
				case sameHost("http://"+at, d.s.Agent):
					d.used = true
					d.add(WrongPort, name, fmt.Sprintf("names %s, and the agent is at %s", at, d.s.Agent), "kraken-agent mirror install")
				}
			}
		}
	}
	return nil
}

// docker looks at daemon.json.
func (d *diagnosis) docker() error {
	text, err := d.read(daemonJSON)
	if err != nil || len(text) == 0 {
		return err
	}
	var f struct {
		Mirrors []string `json:"registry-mirrors"`
	}
	if err := json.Unmarshal(text, &f); err != nil {
		d.add(BrokenFile, daemonJSON, "is no JSON: "+err.Error(), "mend it")
		return nil
	}
	for _, m := range f.Mirrors {
		switch {
		case sameURL(m, d.s.DockerHub):
			d.used = true
		case sameURL(m, d.s.Agent) || sameHost(m, d.s.Agent):
			d.used = true
			d.add(WrongPort, daemonJSON, fmt.Sprintf("names %s: Docker says no registry's name, so it needs the agent's listener for Docker", m), "docker_hub.listen in the agent's configuration, then kraken-agent mirror install")
		}
	}
	return nil
}

// proxyPattern finds a variable in a unit's drop-in or in an environment file.
var proxyPattern = regexp.MustCompile(`(?i)\b(https?_proxy|no_proxy)=("?)([^"\s]*)`)

// proxies looks for proxies of runtimes. What is on loopback never goes to one.
func (d *diagnosis) proxies() error {
	u, err := url.Parse(d.s.Agent)
	if err != nil {
		return err
	}
	if ip, err := netip.ParseAddr(u.Hostname()); u.Hostname() == "localhost" || err == nil && ip.IsLoopback() {
		return nil
	}
	var names []string
	for _, pattern := range []string{"/etc/systemd/system/*.service.d/*.conf", "/etc/environment", "/etc/default/docker", "/etc/default/containerd", "/etc/sysconfig/*"} {
		found, err := filepath.Glob(d.at(pattern))
		if err != nil {
			return err
		}
		names = append(names, found...)
	}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			continue // a folder, or not ours to read
		}
		var through, not string
		for _, m := range proxyPattern.FindAllStringSubmatch(string(text), -1) {
			if strings.EqualFold(m[1], "no_proxy") {
				not = m[3]
			} else {
				through = m[1]
			}
		}
		if through != "" && !slices.ContainsFunc(strings.Split(not, ","), func(n string) bool { return exempts(strings.TrimSpace(n), u.Hostname()) }) {
			shown := "/" + strings.TrimPrefix(strings.TrimPrefix(name, d.root), "/")
			d.add(ProxyVariable, shown, fmt.Sprintf("%s sends what is meant for %s to a proxy", through, u.Host), "add "+u.Hostname()+" to NO_PROXY, or let the agent listen on 127.0.0.1")
		}
	}
	return nil
}

// exempts reports whether an element of NO_PROXY is about a host.
func exempts(element, host string) bool {
	if element == "*" || element == host || strings.HasSuffix(host, "."+strings.TrimPrefix(element, ".")) {
		return element != ""
	}
	p, err := netip.ParsePrefix(element)
	ip, ierr := netip.ParseAddr(host)
	return err == nil && ierr == nil && p.Contains(ip)
}

// agent asks the agent whether it is there.
func (d *diagnosis) agent(ctx context.Context) {
	for _, at := range []string{d.s.Agent, d.s.DockerHub} {
		if at == "" {
			continue
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, at+"/v2/", nil)
		if err != nil {
			d.add(AgentDown, at, err.Error(), "mend the agent's configuration")
			continue
		}
		resp, err := client.Do(req)
		if err != nil {
			d.add(AgentDown, at, "the agent does not answer: "+err.Error(), "systemctl status kraken-agent; meanwhile runtimes go to the registries themselves")
			continue
		}
		_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<16)) // only so that the connection can be used again
		resp.Body.Close()
		if resp.Header.Get("Docker-Distribution-Api-Version") == "" || resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusUnauthorized {
			d.add(AgentDown, at, "who answers there is no agent: "+resp.Status, "ss -ltnp shows who has the port")
		}
	}
}

// sameURL compares two URLs of listeners.
func sameURL(a, b string) bool {
	return a != "" && strings.TrimSuffix(strings.TrimSuffix(a, "/"), "/v2") == strings.TrimSuffix(b, "/")
}

// sameHost reports whether two URLs are at one machine.
func sameHost(a, b string) bool {
	ua, err1 := url.Parse(a)
	ub, err2 := url.Parse(b)
	if err1 != nil || err2 != nil || ua.Host == "" {
		return false
	}
	local := func(h string) bool {
		ip := net.ParseIP(h)
		return h == "localhost" || ip != nil && ip.IsLoopback()
	}
	return ua.Hostname() == ub.Hostname() || local(ua.Hostname()) && local(ub.Hostname())
}
