package tracker

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"
)

const (
	resolveTimeout = 500 * time.Millisecond
	// resolvedFor is how long a resolved name is used; an old answer is used on while there is no new one.
	resolvedFor = 30 * time.Second
)

// hosts turns host:port of origins into addresses, which is all that a compact answer can carry.
type hosts struct {
	lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)

	mu    sync.Mutex
	known map[string]resolved // bounded by the configuration: one for each origin
}

type resolved struct {
	addrs []netip.AddrPort
	until time.Time
}

func newHosts() *hosts {
	return &hosts{lookup: net.DefaultResolver.LookupNetIP, known: map[string]resolved{}}
}

// resolve gives at most one address of each family.
func (h *hosts) resolve(ctx context.Context, hostPort string) ([]netip.AddrPort, error) {
	if a, err := netip.ParseAddrPort(hostPort); err == nil {
		return []netip.AddrPort{netip.AddrPortFrom(a.Addr().Unmap(), a.Port())}, nil
	}
	h.mu.Lock()
	old := h.known[hostPort]
	h.mu.Unlock()
	if time.Now().Before(old.until) {
		return old.addrs, nil
	}
	addrs, err := h.ask(ctx, hostPort)
	if err != nil {
		if len(old.addrs) == 0 {
			return nil, err
		}
		addrs = old.addrs
	}
	h.mu.Lock()
	h.known[hostPort] = resolved{addrs, time.Now().Add(resolvedFor)}
	h.mu.Unlock()
	return addrs, nil
}

func (h *hosts) ask(ctx context.Context, hostPort string) ([]netip.AddrPort, error) {
	host, p, err := net.SplitHostPort(hostPort)
	if err != nil {
		return nil, fmt.Errorf("peer address: %w", err)
	}
	port, err := strconv.ParseUint(p, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("peer address %q: %w", hostPort, err)
	}
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	ips, err := h.lookup(ctx, "ip", host)
	if err != nil {
		return nil, fmt.Errorf("peer address %q: %w", hostPort, err)
	}
	var out []netip.AddrPort
	var have [2]bool
	for _, ip := range ips {
		ip = ip.Unmap()
		family := 0
		if ip.Is6() {
			family = 1
		}
		if !have[family] {
			have[family] = true
			out = append(out, netip.AddrPortFrom(ip.WithZone(""), uint16(port)))
		}
	}
	return out, nil
}
