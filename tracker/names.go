package tracker

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// maxKnownNames bounds the names of certificates whose addresses are remembered.
const maxKnownNames = 10_000

// names looks up the addresses of names in certificates, each at most once in resolvedFor, whatever comes of it.
type names struct {
	lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)

	mu    sync.Mutex
	known *simplelru.LRU[string, named]
}

type named struct {
	addrs []netip.Addr
	until time.Time
}

func newNames() *names {
	known, _ := simplelru.NewLRU[string, named](maxKnownNames, nil) // fails only for a size below one
	return &names{lookup: net.DefaultResolver.LookupNetIP, known: known}
}

// addresses returns what name resolves to, nothing where it does not within resolveTimeout.
func (n *names) addresses(ctx context.Context, name string) []netip.Addr {
	n.mu.Lock()
	old, ok := n.known.Get(name)
	n.mu.Unlock()
	if ok && time.Now().Before(old.until) {
		return old.addrs
	}
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	found, _ := n.lookup(ctx, "ip", name) // a name without an address vouches for none
	for i := range found {
		found[i] = found[i].Unmap().WithZone("")
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.known.Add(name, named{found, time.Now().Add(resolvedFor)})
	return found
}
