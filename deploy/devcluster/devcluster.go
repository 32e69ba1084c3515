// Package devcluster lays out and runs a whole Kraken cluster on this machine's loopback, as processes or containers: a
// stand-in bucket, three origins, a tracker, a build-index, a proxy and agents. It is the one description of a cluster,
// for the command of the same name and for tests against real processes. State, configuration and logs are in one
// folder; Down ends exactly what Up started. Benches and the Python tests have it run in network namespaces, too, which
// test/netns makes. It is no way to run a cluster that matters: see deploy/README.md for that.
package devcluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
)

// Options say what Plan lays out.
type Options struct {
	Dir     string // folder for state, configuration and logs
	Bin     string // folder with the binaries, for processes
	Runtime string // how components run: process (the default) or docker
	Agents  int
	Proxies int // default 1; the others beside the first get free ports
	Origins int // default 3; further ones get free ports. One keeps every blob alone, several keep each twice.
	// Hosts say where components run, by role ("proxy") or by component ("kraken-agent-01"), whose own line wins;
	// default 127.0.0.1. Each host has the ports of the design anew. For processes.
	Hosts map[string]Host
	// FolderBucket makes a folder in Dir the bucket; testfs, the stand-in server, is left out. For processes.
	FolderBucket bool
	// Env is added to the environment of a role's processes, as KEY=value.
	Env map[string][]string
	// FreePorts gives every component ports that are free now, so that several clusters run side by side. Without it
	// the first four agents and everything else have the ports of the design, 16000-16100.
	FreePorts bool
	// MutualTLS makes an authority in Dir and gives each component a certificate of its own, whose names are its id,
	// "localhost" and 127.0.0.1. Origins, tracker and build-index then take only holders of one; so do peers. The proxy
	// has TLS and takes everybody; agents' registries and the admin listeners stay plain.
	MutualTLS bool
	// Login makes the proxy ask who comes: LoginUser, whose password is made, may do everything, everybody may pull
	// public/**. With MutualTLS only: a password goes over TLS.
	Login bool
	// Config has keys by role ("origin") or by component ("kraken-origin-01"), which are laid over those of the
	// template. A map is laid over a map key by key; whatever else replaces what was there. A component's keys win.
	Config map[string]map[string]any
	// Bound ends processes when the program that started them ends, however it ends. Without it they outlive it.
	Bound bool
}

// Component is one process or container. It is written to the state file, so that later commands find what Up started.
type Component struct {
	Name  string `json:"name"`
	Role  string `json:"role"`
	Addr  string `json:"addr"`            // registry or main listener
	Admin string `json:"admin,omitempty"` // admin listener
	Peer  string `json:"peer,omitempty"`
	// Namespace is the network namespace that its listeners are in, see Host.
	Namespace string   `json:"namespace,omitempty"`
	Env       []string `json:"env,omitempty"`
	// of the runtime: pid and its start time, or container id; empty when stopped
	Handle string `json:"handle,omitempty"`
}

// ID is the name that a component has in configurations, such as origin-01.
func (c *Component) ID() string { return strings.TrimPrefix(c.Name, "kraken-") }

// PID is the process of a component of the process runtime, 0 when it does not run.
func (c *Component) PID() int {
	pid, ok := processes{}.pid(c)
	if !ok {
		return 0
	}
	return pid
}

// Host is where the component runs.
func (c *Component) Host() Host {
	ip, _, err := net.SplitHostPort(c.Addr)
	if err != nil {
		return loopback
	}
	return Host{IP: ip, Namespace: c.Namespace}
}

func (c *Component) ports() []string {
	var out []string
	for _, a := range []string{c.Addr, c.Admin, c.Peer} {
		if a != "" {
			out = append(out, a)
		}
	}
	return out
}

// Cluster is the plan and the state of a cluster, its components in the order in which they start. It is not for
// several goroutines at once.
type Cluster struct {
	Runtime    string       `json:"runtime"`
	MutualTLS  bool         `json:"mutual_tls,omitempty"`
	Login      bool         `json:"login,omitempty"`
	Components []*Component `json:"components"`
	Dir        string       `json:"-"`
	Bin        string       `json:"-"`

	rt           runner
	config       map[string]map[string]any
	folderBucket bool
}

const stateFile = "cluster.json"

// ErrNone is that Up has started nothing in a folder, or Down has ended it.
var ErrNone = errors.New("no cluster is running")

func newCluster(o Options) (*Cluster, error) {
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, err
	}
	bin, err := filepath.Abs(o.Bin)
	if err != nil {
		return nil, err
	}
	cl := &Cluster{Runtime: o.Runtime, Dir: dir, Bin: bin}
	return cl, cl.setRuntime(o.Bound)
}

func (cl *Cluster) setRuntime(bound bool) error {
	switch cl.Runtime {
	case "process", "":
		cl.Runtime, cl.rt = "process", processes{bound: bound}
	case "docker":
		cl.rt = containers{}
	default:
		return fmt.Errorf("runtime %q: want process or docker", cl.Runtime)
	}
	return nil
}

// Load reads the cluster that Up started in o.Dir; of o it needs that and Bin. ErrNone when there is none.
func Load(o Options) (*Cluster, error) {
	cl, err := newCluster(o)
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(filepath.Join(cl.Dir, stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w in %s: start one with `make devcluster`", ErrNone, cl.Dir)
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, cl); err != nil {
		return nil, fmt.Errorf("read %s: %w", filepath.Join(cl.Dir, stateFile), err)
	}
	return cl, cl.setRuntime(o.Bound)
}

func (cl *Cluster) save() error {
	b, err := json.MarshalIndent(cl, "", "  ")
	if err != nil {
		return err
	}
	tmp := filepath.Join(cl.Dir, stateFile+".new")
	if err := os.WriteFile(tmp, append(b, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(cl.Dir, stateFile))
}

// Role returns the components of a role: testfs, origin, tracker, build-index, proxy or agent.
func (cl *Cluster) Role(role string) []*Component {
	var out []*Component
	for _, c := range cl.Components {
		if c.Role == role {
			out = append(out, c)
		}
	}
	return out
}

// Find returns a component by its name, "kraken-" may be left out.
func (cl *Cluster) Find(name string) (*Component, error) {
	for _, c := range cl.Components {
		if c.Name == name || c.ID() == name {
			return c, nil
		}
	}
	return nil, fmt.Errorf("no component %q; `devcluster status` lists them", name)
}

// URL is a component's main listener, without a slash at the end.
func (cl *Cluster) URL(c *Component) string { return cl.scheme(c.Role) + c.Addr }

// scheme is of the main listener of a role: an agent stays plain, because it serves its own node's localhost.
func (cl *Cluster) scheme(role string) string {
	if cl.MutualTLS && role != "agent" && role != "testfs" {
		return "https://"
	}
	return "http://"
}

// probe is where readiness is asked: on the main listener, or where that needs a certificate on the admin listener.
func (cl *Cluster) probe(c *Component) string {
	if cl.MutualTLS && c.Admin != "" {
		return "http://" + c.Admin + "/readiness"
	}
	return "http://" + c.Addr + "/readiness"
}

// first is the address of the first component of a role.
func (cl *Cluster) first(role string) string {
	for _, c := range cl.Role(role) {
		return c.Addr
	}
	return ""
}
