package devcluster

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"strconv"
)

// Plan lays out a new cluster. Nothing is written or started.
func Plan(o Options) (*Cluster, error) {
	if o.Agents < 0 || o.Proxies < 0 || o.Origins < 0 {
		return nil, fmt.Errorf("%d agents, %d proxies, %d origins: must not be negative", o.Agents, o.Proxies, o.Origins)
	}
	cl, err := newCluster(o)
	if err != nil {
		return nil, err
	}
	switch {
	case o.Login && !o.MutualTLS:
		return nil, errors.New("login: with mutual TLS only, for a password goes over TLS")
	case cl.Runtime == "docker" && o.MutualTLS:
		return nil, errors.New("mutual TLS: for processes only, a container's user can't read the keys")
	case cl.Runtime == "docker" && (len(o.Hosts) > 0 || len(o.Env) > 0 || o.FolderBucket):
		return nil, errors.New("hosts, environment and a folder as bucket: for processes only")
	}
	cl.MutualTLS, cl.Login, cl.config, cl.folderBucket = o.MutualTLS, o.Login, o.Config, o.FolderBucket
	p := planner{o: o, cl: cl, taken: map[int]bool{}, count: map[string]int{}}
	if !o.FolderBucket {
		p.add("testfs", 1)
	}
	p.add("origin", cmp.Or(o.Origins, 3))
	p.add("tracker", 1)
	p.add("build-index", 1)
	p.add("proxy", cmp.Or(o.Proxies, 1))
	p.add("agent", o.Agents)
	return cl, p.err
}

// planner gives components their names, hosts and ports.
type planner struct {
	o     Options
	cl    *Cluster
	taken map[int]bool   // free ports that were given
	count map[string]int // components by role and host
	err   error
}

// add adds n components of a role.
func (p *planner) add(role string, n int) {
	for i := 1; i <= n; i++ {
		c := &Component{Name: fmt.Sprintf("kraken-%s-%02d", role, i), Role: role, Env: p.o.Env[role]}
		host, ok := p.o.Hosts[c.Name]
		if !ok {
			if host, ok = p.o.Hosts[role]; !ok {
				host = loopback
			}
		}
		c.Namespace = host.Namespace
		key := role + " " + host.IP
		p.count[key]++
		ports, known := designed(role, p.count[key])
		if (!known || p.o.FreePorts) && p.err == nil {
			ports, p.err = freePorts(len(ports), p.taken)
		}
		for k, addr := range []*string{&c.Addr, &c.Admin, &c.Peer}[:len(ports)] {
			*addr = net.JoinHostPort(host.IP, strconv.Itoa(ports[k]))
		}
		p.cl.Components = append(p.cl.Components, c)
	}
}

// designed returns the ports of the n-th component of a role on one host: main, admin and peer listener, as many as the
// role has. known is false when the design has none for that many.
func designed(role string, n int) (ports []int, known bool) {
	switch role {
	case "testfs":
		return []int{16050}, n == 1
	case "origin":
		return []int{16030 + n, 16033 + n, 16040 + n}, n <= 3
	case "tracker":
		return []int{16020, 16021}, n == 1
	case "build-index":
		return []int{16010, 16011}, n == 1
	case "proxy":
		return []int{16000, 16001}, n == 1
	default: // agent
		base := 16051 + 10*n
		return []int{base, base + 2, base + 1}, n <= 4
	}
}
