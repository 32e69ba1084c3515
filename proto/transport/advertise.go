package transport

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"kraken/proto/config"
)

// ResolvePeer is the IP address, or ip:port, that others dial: value itself, or with the name of a network interface in
// the place of the address, that interface's. Empty stays empty; what is neither is put into m under key.
func ResolvePeer(m *config.Mistakes, key, value string) string {
	if _, err := netip.ParseAddr(value); err == nil || value == "" {
		return value
	}
	host, port, err := net.SplitHostPort(value)
	if err != nil {
		host, port = value, ""
	}
	a, err := netip.ParseAddr(host)
	if err != nil {
		if a, err = interfaceAddr(host); err != nil {
			m.Add(key, "%q: want an IP address, ip:port, or the name of a network interface of this machine: %w", value, err)
			return value
		}
	}
	if port == "" {
		return a.String()
	}
	m.HostPort(key, net.JoinHostPort(host, port))
	return net.JoinHostPort(a.String(), port)
}

// resolveServer is the host:port, or the host alone where the port is the listener's, that others reach a server at. A
// name without a port is a network interface's; one with a port is an interface's where there is such, else a host's.
func resolveServer(m *config.Mistakes, key, value string) string {
	if _, err := netip.ParseAddr(value); err == nil || value == "" {
		return value
	}
	host, port, err := net.SplitHostPort(value)
	if err != nil {
		a, err := interfaceAddr(value)
		if err != nil {
			m.Add(key, "%q: want host:port, or the name of a network interface of this machine: %w", value, err)
			return value
		}
		return a.String()
	}
	m.HostPort(key, value)
	if a, err := interfaceAddr(host); err == nil {
		return net.JoinHostPort(a.String(), port)
	}
	return value
}

// interfaceAddr is the address that others reach a network interface of this machine at.
func interfaceAddr(name string) (netip.Addr, error) {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("there is no interface %q here: this machine has %s", name, interfaces())
	}
	addrs, err := i.Addrs()
	if err != nil {
		return netip.Addr{}, fmt.Errorf("interface %s: %w", name, err)
	}
	a, ok := globalOf(addrs)
	if !ok {
		return netip.Addr{}, fmt.Errorf("interface %s: %w", name, errNoAddress)
	}
	return a, nil
}

var errNoAddress = errors.New("it has no address that other machines could reach")

// globalOf is the first global IPv4 address, or where there is none the first global IPv6 address.
func globalOf(addrs []net.Addr) (netip.Addr, bool) {
	var six netip.Addr
	for _, n := range addrs {
		p, err := netip.ParsePrefix(n.String())
		if err != nil || !p.Addr().IsGlobalUnicast() {
			continue
		}
		if p.Addr().Is4() {
			return p.Addr(), true
		}
		if !six.IsValid() {
			six = p.Addr()
		}
	}
	return six, six.IsValid()
}

// interfaces names those of this machine.
func interfaces() string {
	all, err := net.Interfaces()
	if err != nil || len(all) == 0 {
		return "none"
	}
	names := make([]string, len(all))
	for i, n := range all {
		names[i] = n.Name
	}
	return strings.Join(names, ", ")
}
