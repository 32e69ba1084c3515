package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// network is a bridge in a namespace of its own, and nodes around it. Nothing of the machine's own network is touched.
type network struct {
	tag   string
	hub   string
	nodes []*node
}

// node is a network namespace with one link to the bridge.
type node struct {
	name string
	ns   string
	ip   string
	mac  string
	dev  string // the bridge's end of its link
}

func command(args ...string) error {
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

func commands(lines ...string) error {
	for _, l := range lines {
		if err := command(strings.Fields(l)...); err != nil {
			return err
		}
	}
	return nil
}

func newNetwork(names ...string) (_ *network, err error) {
	n := &network{tag: fmt.Sprintf("kb%d", os.Getpid())}
	n.hub = n.tag + "-hub"
	defer func() {
		if err != nil {
			err = errors.Join(err, n.close())
		}
	}()
	if err := commands("ip netns add "+n.hub, "ip -n "+n.hub+" link add br0 type bridge", "ip -n "+n.hub+" link set br0 up"); err != nil {
		return nil, err
	}
	for i, name := range names {
		x := &node{name: name, ns: n.tag + "-" + name, ip: fmt.Sprintf("10.213.8.%d", i+10), mac: fmt.Sprintf("02:00:0a:d5:08:%02x", i+10), dev: "v" + strconv.Itoa(i)}
		if err := command("ip", "netns", "add", x.ns); err != nil {
			return nil, err
		}
		n.nodes = append(n.nodes, x)
		if err := commands(
			"ip link add eth0 netns "+x.ns+" address "+x.mac+" type veth peer name "+x.dev+" netns "+n.hub,
			"ip -n "+n.hub+" link set "+x.dev+" master br0 up",
			"ip -n "+x.ns+" addr add "+x.ip+"/24 dev eth0",
			"ip -n "+x.ns+" link set eth0 up",
			"ip -n "+x.ns+" link set lo up",
		); err != nil {
			return nil, err
		}
	}
	return n, n.introduce()
}

// introduce tells the nodes each other's hardware addresses. All namespaces share one table of what ARP has found,
// which the kernel cleans from 512 entries on and ends at 1,024 (gc_thresh2 and 3 of arp(7)): 33 nodes that all talk to
// each other need 1,056, and the last ones would reach nobody. Permanent entries don't count.
func (n *network) introduce() error {
	for _, x := range n.nodes {
		var lines strings.Builder
		for _, other := range n.nodes {
			if other != x {
				fmt.Fprintf(&lines, "neigh replace %s lladdr %s dev eth0 nud permanent\n", other.ip, other.mac)
			}
		}
		cmd := exec.Command("ip", "-n", x.ns, "-batch", "-")
		cmd.Stdin = strings.NewReader(lines.String())
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("neighbours of %s: %w: %s", x.name, err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}

func (n *network) close() error {
	var errs []error
	for _, x := range n.nodes {
		errs = append(errs, command("ip", "netns", "del", x.ns))
	}
	return errors.Join(append(errs, command("ip", "netns", "del", n.hub))...)
}

// shape limits the nodes' links in both directions; 0 Mbit/s takes the limit away.
func (n *network) shape(mbit int, nodes []*node) error {
	for _, x := range nodes {
		for _, end := range [][2]string{{x.ns, "eth0"}, {n.hub, x.dev}} {
			if mbit == 0 {
				if err := commands("tc -n " + end[0] + " qdisc del dev " + end[1] + " root"); err != nil {
					return err
				}
				continue
			}
			if err := commands(fmt.Sprintf("tc -n %s qdisc replace dev %s root tbf rate %dmbit burst 64kb latency 100ms", end[0], end[1], mbit)); err != nil {
				return err
			}
		}
	}
	return nil
}

// enter calls fn on a thread that is in a network namespace; sockets that fn makes stay in it. The empty name is the
// machine's own.
func enter(ns string, fn func() error) error {
	if ns == "" {
		return fn()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer home.Close()
	there, err := os.Open(filepath.Join("/run/netns", ns))
	if err != nil {
		return err
	}
	defer there.Close()
	if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter namespace %s: %w", ns, err)
	}
	err = fn()
	if herr := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); herr != nil {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine instead of serving others
		return errors.Join(err, herr)
	}
	return err
}

// client makes requests from inside a node.
func (x *node) client() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
		err = enter(x.ns, func() error {
			c, err = (&net.Dialer{}).DialContext(ctx, network, addr)
			return err
		})
		return c, err
	}}}
}

func (x *node) listen(port int) (l net.Listener, err error) {
	err = enter(x.ns, func() error {
		l, err = net.Listen("tcp", fmt.Sprintf("%s:%d", x.ip, port))
		return err
	})
	return l, err
}

// headers are of a frame: 14 bytes of Ethernet, 20 of IPv4, 32 of TCP with time stamps. The kernel counts a frame that
// is not segmented yet, of up to 64 KiB, as one.
const headers = 66

// traffic is the payload that each node has received and sent, by name, as the kernel counted it at the bridge.
type traffic map[string]struct{ received, sent int64 }

func (n *network) traffic() (traffic, error) {
	out := traffic{}
	err := enter(n.hub, func() error {
		f, err := os.Open("/proc/thread-self/net/dev")
		if err != nil {
			return err
		}
		defer f.Close()
		for s := bufio.NewScanner(f); s.Scan(); {
			dev, rest, ok := strings.Cut(strings.TrimSpace(s.Text()), ":")
			fields := strings.Fields(rest)
			if !ok || len(fields) < 10 {
				continue
			}
			for _, x := range n.nodes {
				if x.dev == dev {
					payload := func(at int) int64 {
						bytes, _ := strconv.ParseInt(fields[at], 10, 64)
						frames, _ := strconv.ParseInt(fields[at+1], 10, 64)
						return bytes - headers*frames
					}
					// the bridge sends what the node receives
					out[x.name] = struct{ received, sent int64 }{payload(8), payload(0)}
				}
			}
		}
		return nil
	})
	return out, err
}

// sampler records the traffic of all nodes until it is stopped.
type sampler struct {
	cancel context.CancelFunc
	done   chan struct{}
	at     []time.Duration
	seen   []traffic
	err    error
}

func (n *network) sample(every time.Duration) *sampler {
	ctx, cancel := context.WithCancel(context.Background())
	s := &sampler{cancel: cancel, done: make(chan struct{})}
	began := time.Now()
	go func() {
		defer close(s.done)
		t := time.NewTicker(every)
		defer t.Stop()
		for {
			seen, err := n.traffic()
			if err != nil {
				s.err = err
				return
			}
			s.at, s.seen = append(s.at, time.Since(began)), append(s.seen, seen)
			select {
			case <-t.C:
			case <-ctx.Done():
				return
			}
		}
	}()
	return s
}

func (s *sampler) stop() error {
	s.cancel()
	<-s.done
	return s.err
}
