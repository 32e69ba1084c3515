package tracker

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// maxResolved bounds the names of certificates whose addresses are remembered.
const maxResolved = 10_000

// resolver looks up the addresses of names in certificates, each at most once in resolvedFor, whatever comes of it.
type resolver struct {
	lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)

	mu    sync.Mutex
	known *simplelru.LRU[string, hostAddrs]
}

type hostAddrs struct {
	addrs []netip.Addr
	until time.Time
}

func newResolver() *resolver {
	known, _ := simplelru.NewLRU[string, hostAddrs](maxResolved, nil) // fails only for a size below one
	return &resolver{lookup: net.DefaultResolver.LookupNetIP, known: known}
}

// addresses returns what name resolves to, nothing where it does not within resolveTimeout.
func (r *resolver) addresses(ctx context.Context, name string) []netip.Addr {
	r.mu.Lock()
	old, ok := r.known.Get(name)
	r.mu.Unlock()
	if ok && time.Now().Before(old.until) {
		return old.addrs
	}
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	found, _ := r.lookup(ctx, "ip", name) // a name without an address vouches for none
	for i := range found {
		found[i] = found[i].Unmap().WithZone("")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.known.Add(name, hostAddrs{found, time.Now().Add(resolvedFor)})
	return found
}
