// Package netns makes networks of namespaces on one machine: nodes around a bridge, each with an address, links that
// can be limited to a rate, and the kernel's own count of what each has received and sent. Nothing of the machine's own
// network is touched. It needs root. The command of the same name does it for tests that are not in Go.
package netns

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"kraken/deploy/devcluster"
)

// Network is a bridge in a namespace of its own, and nodes around it. Namespaces are named TAG-NODE.
type Network struct {
	Tag   string
	Nodes []*Node
}

// Node is a network namespace with one link to the bridge.
type Node struct {
	devcluster.Host
	Name string
	mac  string
}

// dev is the bridge's end of the node's link.
func (x *Node) dev() string { return "v-" + x.Name }

// maxName is the longest name of a node: the kernel takes 15 characters as the name of a device.
const maxName = 15 - len("v-")

func (n *Network) hub() devcluster.Host { return devcluster.Host{Namespace: n.Tag + "-hub"} }

// New makes a network of nodes by these names. A tag is of one network of the machine.
func New(tag string, names ...string) (_ *Network, err error) {
	n := &Network{Tag: tag}
	for _, name := range names {
		if len(name) > maxName || name == "hub" || strings.ContainsAny(name, "/ ") {
			return nil, fmt.Errorf("node %q: want at most %d characters without slashes and spaces, and not hub", name, maxName)
		}
	}
	if len(names) > 200 {
		return nil, fmt.Errorf("%d nodes: the network has addresses for 200", len(names))
	}
	if left, err := Open(tag); err == nil {
		return nil, fmt.Errorf("network %s exists, with %d nodes", tag, len(left.Nodes))
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	hub := n.hub().Namespace
	if err := commands("ip netns add "+hub, "ip -n "+hub+" link add br0 type bridge", "ip -n "+hub+" link set br0 up"); err != nil {
		return nil, err
	}
	for i, name := range names {
		x := &Node{Name: name, mac: fmt.Sprintf("02:00:0a:d5:08:%02x", i+10)}
		x.IP, x.Namespace = fmt.Sprintf("10.213.8.%d", i+10), tag+"-"+name
		if err := commands("ip netns add " + x.Namespace); err != nil {
			return nil, err
		}
		n.Nodes = append(n.Nodes, x)
		if err := commands(
			"ip link add eth0 netns "+x.Namespace+" address "+x.mac+" type veth peer name "+x.dev()+" netns "+hub,
			"ip -n "+hub+" link set "+x.dev()+" master br0 up",
			"ip -n "+x.Namespace+" addr add "+x.IP+"/24 dev eth0",
			"ip -n "+x.Namespace+" link set eth0 up",
			"ip -n "+x.Namespace+" link set lo up",
		); err != nil {
			return nil, err
		}
	}
	return n, n.introduce()
}

// Open finds the network that New made with a tag. Its nodes are without addresses.
func Open(tag string) (*Network, error) {
	found, err := filepath.Glob(filepath.Join("/run/netns", tag+"-*"))
	if err != nil {
		return nil, err
	}
	n := &Network{Tag: tag}
	for _, f := range found {
		if ns := filepath.Base(f); ns != n.hub().Namespace {
			n.Nodes = append(n.Nodes, &Node{Name: strings.TrimPrefix(ns, tag+"-"), Host: devcluster.Host{Namespace: ns}})
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("no network %s", tag)
	}
	return n, nil
}

// introduce tells the nodes each other's hardware addresses. All namespaces share one table of what ARP has found,
// which the kernel cleans from 512 entries on and ends at 1,024 (gc_thresh2 and 3 of arp(7)): 33 nodes that all talk to
// each other need 1,056, and the last ones would reach nobody. Permanent entries don't count.
func (n *Network) introduce() error {
	for _, x := range n.Nodes {
		var lines strings.Builder
		for _, other := range n.Nodes {
			if other != x {
				fmt.Fprintf(&lines, "neigh replace %s lladdr %s dev eth0 nud permanent\n", other.IP, other.mac)
			}
		}
		cmd := exec.Command("ip", "-n", x.Namespace, "-batch", "-")
		cmd.Stdin = strings.NewReader(lines.String())
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("neighbours of %s: %w: %s", x.Name, err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}

// Close removes the network. Processes in it lose theirs.
func (n *Network) Close() error {
	var errs []error
	for _, x := range n.Nodes {
		errs = append(errs, commands("ip netns del "+x.Namespace))
	}
	return errors.Join(append(errs, commands("ip netns del "+n.hub().Namespace))...)
}

// Find returns nodes by their names.
func (n *Network) Find(names ...string) ([]*Node, error) {
	var out []*Node
	for _, name := range names {
		i := slices.IndexFunc(n.Nodes, func(x *Node) bool { return x.Name == name })
		if i < 0 {
			return nil, fmt.Errorf("network %s has no node %q", n.Tag, name)
		}
		out = append(out, n.Nodes[i])
	}
	return out, nil
}

// Shape limits the nodes' links in both directions; 0 Mbit/s takes the limit away.
func (n *Network) Shape(mbit int, nodes ...*Node) error {
	for _, x := range nodes {
		for _, end := range [][2]string{{x.Namespace, "eth0"}, {n.hub().Namespace, x.dev()}} {
			line := fmt.Sprintf("tc -n %s qdisc replace dev %s root tbf rate %dmbit burst 64kb latency 100ms", end[0], end[1], mbit)
			if mbit == 0 {
				line = fmt.Sprintf("tc -n %s qdisc del dev %s root", end[0], end[1])
			}
			if err := commands(line); err != nil {
				return err
			}
		}
	}
	return nil
}

// headers are of a frame: 14 bytes of Ethernet, 20 of IPv4, 32 of TCP with time stamps. The kernel counts a frame that
// is not segmented yet, of up to 64 KiB, as one.
const headers = 66

// Traffic is the TCP payload that each node has received and sent, by name, in bytes.
type Traffic map[string]Count

// Count is of one node.
type Count struct{ Received, Sent int64 }

// Traffic returns what the kernel counted at the bridge.
func (n *Network) Traffic() (Traffic, error) {
	out := Traffic{}
	byDev := map[string]string{}
	for _, x := range n.Nodes {
		byDev[x.dev()] = x.Name
	}
	err := n.hub().Enter(func() error {
		f, err := os.Open("/proc/thread-self/net/dev")
		if err != nil {
			return err
		}
		defer f.Close()
		lines := bufio.NewScanner(f)
		for lines.Scan() {
			dev, rest, _ := strings.Cut(strings.TrimSpace(lines.Text()), ":")
			fields := strings.Fields(rest)
			name, ours := byDev[dev]
			if !ours || len(fields) < 10 {
				continue
			}
			payload := func(at int) int64 {
				bytes, _ := strconv.ParseInt(fields[at], 10, 64)
				frames, _ := strconv.ParseInt(fields[at+1], 10, 64)
				return bytes - headers*frames
			}
			out[name] = Count{Received: payload(8), Sent: payload(0)} // the bridge sends what the node receives
		}
		return lines.Err()
	})
	return out, err
}

// Since returns the traffic of now without that of before.
func (n *Network) Since(before Traffic) (Traffic, error) {
	now, err := n.Traffic()
	for name, t := range now {
		now[name] = Count{t.Received - before[name].Received, t.Sent - before[name].Sent}
	}
	return now, err
}

// commands runs command lines, words separated by spaces, until one fails.
func commands(lines ...string) error {
	for _, l := range lines {
		words := strings.Fields(l)
		if out, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", l, err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}
