// Package mirror sets the container runtimes of a node up to ask the agent first, takes that back, and finds out why a
// runtime does not ask it. It reads and writes runtimes' configuration files; it starts no runtime, and no agent.
package mirror

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	securejoin "github.com/cyphar/filepath-securejoin"
)

// Settings is what runtimes are set up for.
type Settings struct {
	// Root is the folder in which the node's file system is, empty for the file system itself.
	Root string
	// Agent is the URL of the agent's registry, and DockerHub that of its listener for Docker, empty without one.
	Agent, DockerHub string
	// Own are the cluster's own names.
	Own []string
	// Registries are what the agent is asked for first, empty for all. Podman, CRI-O and BuildKit know no "all": for
	// them it is WellKnown, and the cluster's own names.
	Registries []string
	// Runtimes are those to set up, of Runtimes; empty for all that are found.
	Runtimes []string
	// NoFallback makes the agent the only source of images: while it is away nothing can be pulled.
	NoFallback bool
	// ContainerdVersion is what is taken for the version of containerd, such as 2.2; empty: it is asked.
	ContainerdVersion string
	// DryRun prints what would be written, and writes nothing.
	DryRun bool
}

// WellKnown are the registries for runtimes that can't be set up for all.
var WellKnown = []string{"docker.io", "gcr.io", "ghcr.io", "mcr.microsoft.com", "nvcr.io", "public.ecr.aws", "quay.io", "registry.gitlab.com", "registry.k8s.io"}

// Runtimes are the names of what can be set up.
var Runtimes = []string{"containerd", "containers", "docker", "k3s", "rke2", "buildkit"}

// file is what a runtime's configuration file is to be.
type file struct {
	path string // below the root, begins with a slash
	text []byte
}

// setUp is how one runtime is set up.
type setUp struct {
	runtime string
	// found reports whether the runtime is on the node.
	found func(node) bool
	// files returns what its files are to be. read returns what a file is now, nil where it is not there.
	files func(n node, s Settings) ([]file, error)
	// after is what else is to be done.
	after string
}

// setUps are all runtimes', in the order of Runtimes.
var setUps = []setUp{
	{
		runtime: "containerd", found: hasContainerd, files: containerdFiles,
		after: "hosts.toml is read at each pull; after a change of config.toml: systemctl restart containerd",
	},
	{
		runtime: "containers", found: hasContainers, files: containersFiles,
		after: "Podman reads it at each pull; CRI-O: systemctl reload crio",
	},
	{
		runtime: "docker", found: func(n node) bool { return n.has("/usr/bin/dockerd", "/usr/sbin/dockerd", "/etc/docker") },
		files: dockerFiles, after: "systemctl reload docker",
	},
	{
		runtime: "k3s", found: func(n node) bool { return n.has("/etc/rancher/k3s", "/var/lib/rancher/k3s", "/usr/local/bin/k3s") },
		files: rancherFiles("/etc/rancher/k3s"), after: "systemctl restart k3s, or k3s-agent",
	},
	{
		runtime: "rke2", found: func(n node) bool { return n.has("/etc/rancher/rke2", "/var/lib/rancher/rke2") },
		files: rancherFiles("/etc/rancher/rke2"), after: "systemctl restart rke2-server, or rke2-agent",
	},
	{
		runtime: "buildkit", found: func(n node) bool { return n.has("/etc/buildkit", "/usr/bin/buildkitd", "/usr/local/bin/buildkitd") },
		files: buildkitFiles, after: "restart buildkitd",
	},
}

// chosen returns how the wanted runtimes, or those found, are set up.
func (s Settings) chosen(n node) ([]setUp, error) {
	var out []setUp
	for _, name := range s.Runtimes {
		if !slices.Contains(Runtimes, name) {
			return nil, fmt.Errorf("runtime %q: want some of %s", name, strings.Join(Runtimes, ", "))
		}
	}
	for _, u := range setUps {
		if slices.Contains(s.Runtimes, u.runtime) || len(s.Runtimes) == 0 && u.found(n) {
			out = append(out, u)
		}
	}
	if len(out) == 0 {
		return nil, errors.New("no runtime was found on this node: name some of " + strings.Join(Runtimes, ", ") + ", or give --root")
	}
	return out, nil
}

// errLeftOut is a runtime that can't be set up as the settings say; others can.
var errLeftOut = errors.New("left out")

// check returns what is wrong with the settings.
func (s Settings) check() error {
	if u, err := url.Parse(s.Agent); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return fmt.Errorf("the agent's URL is %q: want http://127.0.0.1:16061", s.Agent)
	}
	for _, r := range s.Registries {
		if u, err := url.Parse("//" + r); err != nil || u.Host != r || r == "" {
			return fmt.Errorf("%q is no name of a registry: want host or host:port", r)
		}
	}
	return s.checkRoot()
}

// checkRoot wants the node's root to be there.
func (s Settings) checkRoot() error {
	if _, err := os.Stat(cmp.Or(s.Root, "/")); err != nil {
		return fmt.Errorf("the node's root: %w", err)
	}
	return nil
}

// listed are the registries for runtimes that don't know "all".
func (s Settings) listed() []string {
	if len(s.Registries) > 0 {
		return s.Registries
	}
	out := slices.Clone(WellKnown)
	for _, own := range s.Own {
		if own != s.hostPort() && !slices.Contains(out, own) {
			out = append(out, own)
		}
	}
	return out
}

// hostPort is the agent's host and port.
func (s Settings) hostPort() string {
	u, err := url.Parse(s.Agent)
	if err != nil {
		return ""
	}
	return u.Host
}

// plain reports whether the agent speaks plain HTTP.
func (s Settings) plain() bool { return strings.HasPrefix(s.Agent, "http://") }

// Install sets runtimes up, and says on out what it did. What was there is kept for Uninstall, and so is what somebody
// has changed since the last Install.
func Install(s Settings, out io.Writer) error {
	if err := s.check(); err != nil {
		return err
	}
	n := node{root: s.Root}
	all, err := s.chosen(n)
	if err != nil {
		return err
	}
	kept, err := n.readKept()
	if err != nil {
		return err
	}
	var wanted []string
	for _, u := range all {
		files, err := u.files(node{s.Root, kept}, s)
		if errors.Is(err, errLeftOut) && len(s.Runtimes) == 0 {
			fmt.Fprintf(out, "%s: %v\n", u.runtime, err)
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", u.runtime, err)
		}
		changed := false
		for _, f := range files {
			wanted = append(wanted, f.path)
			is, err := n.read(f.path)
			if err != nil {
				return err
			}
			switch {
			case is != nil && string(is) == string(f.text):
				fmt.Fprintf(out, "%s: %s is as it should be\n", u.runtime, f.path)
				continue
			case s.DryRun:
				fmt.Fprintf(out, "%s: %s would be\n%s\n", u.runtime, f.path, indent(f.text))
				continue
			}
			if err := n.write(kept, u.runtime, f, s.Agent, s.DockerHub); err != nil {
				return fmt.Errorf("%s: %w", u.runtime, err)
			}
			changed = true
			fmt.Fprintf(out, "%s: wrote %s\n", u.runtime, f.path)
		}
		if changed {
			fmt.Fprintf(out, "%s: %s\n", u.runtime, u.after)
		}
	}
	if !s.DryRun {
		which := func(path string) bool {
			mine := slices.ContainsFunc(all, func(u setUp) bool { return u.runtime == kept.Files[path].Runtime })
			return mine && !slices.Contains(wanted, path)
		}
		if err := takeBack(n, kept, which, out); err != nil {
			return err
		}
	}
	if s.NoFallback {
		fmt.Fprintln(out, "without fall-back: while the agent is away this node can't pull any image")
	}
	return nil
}

// Uninstall puts back what was there before the first Install. From a file that somebody has changed since only what
// was installed is taken out; where that can't be told from the rest the file is left alone, and named in the error.
func Uninstall(s Settings, out io.Writer) error {
	if err := s.checkRoot(); err != nil {
		return err
	}
	n := node{root: s.Root}
	kept, err := n.readKept()
	if err != nil {
		return err
	}
	if len(kept.Files) == 0 {
		fmt.Fprintln(out, "nothing was installed")
		return nil
	}
	if s.DryRun {
		for _, path := range kept.paths() {
			fmt.Fprintf(out, "%s would be as it was before\n", path)
		}
		return nil
	}
	return takeBack(n, kept, func(string) bool { return true }, out)
}

// takeBack restores the files that which says, and forgets them.
func takeBack(n node, kept *kept, which func(path string) bool, out io.Writer) error {
	var errs []error
	for _, path := range kept.paths() {
		if !which(path) {
			continue
		}
		did, err := n.takeBack(path, kept.Files[path])
		if err != nil {
			errs = append(errs, err)
			continue
		}
		fmt.Fprintf(out, "%s %s\n", path, did)
		delete(kept.Files, path)
	}
	return errors.Join(append(errs, n.writeKept(kept))...)
}

// takeBack takes what was installed out of a file, and says what it did.
func (n node) takeBack(path string, k keptFile) (did string, err error) {
	is, err := n.read(path)
	if err != nil {
		return "", err
	}
	theirs := fmt.Errorf("%s %w; what it was before is in %s", path, errTheirs, keptPath)
	if is == nil {
		if k.Original == nil {
			return "has gone", nil
		}
		return "", theirs
	}
	rest, err := k.without(path, is)
	switch changed := digestOf(is) != k.Wrote; {
	case errors.Is(err, errTheirs), err == nil && changed && bytes.Equal(rest, is):
		return "", theirs
	case err != nil:
		return "", fmt.Errorf("%s: %w", path, err)
	case changed:
		did = "was changed since it was installed: what was installed was taken out, and the rest is as it was"
	default:
		did = "is as it was before"
	}
	return did, n.restore(path, k, rest)
}

func indent(text []byte) string {
	return "    " + strings.ReplaceAll(strings.TrimRight(string(text), "\n"), "\n", "\n    ")
}

// URLOf is the URL by which the runtimes of a node reach a listener of the agent: a wildcard address is loopback.
func URLOf(listen string, tls bool) (string, error) {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return "", fmt.Errorf("listener %q: %w", listen, err)
	}
	if port == "0" {
		return "", fmt.Errorf("listener %s takes a free port: runtimes need a fixed one", listen)
	}
	if a, err := netip.ParseAddr(host); host == "" || err == nil && a.IsUnspecified() {
		host = "127.0.0.1"
	}
	scheme := "http://"
	if tls {
		scheme = "https://"
	}
	return scheme + net.JoinHostPort(host, port), nil
}

// node is the file system of a node.
type node struct {
	root string
	// before, where set, makes files that Install wrote read as what they are without that.
	before *kept
}

// at is where a path of the node is here, links followed as on the node: an absolute one begins at its root.
func (n node) at(path string) string {
	root := cmp.Or(n.root, "/")
	at, err := securejoin.SecureJoin(root, path)
	if err != nil { // links in a circle: opening says so
		return filepath.Join(root, path)
	}
	return at
}

// has reports whether any of paths is there.
func (n node) has(paths ...string) bool {
	return slices.ContainsFunc(paths, func(p string) bool {
		_, err := os.Stat(n.at(p))
		return err == nil
	})
}

// read returns a file, nil where there is none.
func (n node) read(path string) ([]byte, error) {
	b, err := os.ReadFile(n.at(path))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if n.before != nil && err == nil {
		if k, ours := n.before.Files[path]; ours {
			return k.without(path, b)
		}
	}
	if err == nil && b == nil {
		b = []byte{}
	}
	return b, err
}
