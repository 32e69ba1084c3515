package upstream

import (
	"fmt"
	"strings"
	"sync"
	"time"

	"kraken/proto/registry"
)

// Budget bounds what waits for upstreams at once: in all, for each registry, and for all that only patterns take in,
// which whoever asks makes up. So no registry, however slow it is, keeps the others from being asked. It is safe for
// concurrent use.
type Budget struct {
	what                 string
	all, each, strangers int

	mu    sync.Mutex
	taken int
	named int            // of patterns
	hosts map[string]int // by registry
}

// NewBudget returns a budget of all, an eighth of which is for one registry at most, and half for those of patterns.
// what is what it counts, in words.
func NewBudget(what string, all int) *Budget {
	return &Budget{what: what, all: all, each: max(all/8, 1), strangers: max(all/2, 1), hosts: map[string]int{}}
}

// Take counts one more for a registry, until release is called: ErrUnavailable where there are too many.
func (b *Budget) Take(r *Registry) (release func(), err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	stranger := strings.Contains(r.RegistryConfig.Registry, "*")
	if b.taken >= b.all || b.hosts[r.Host] >= b.each || stranger && b.named >= b.strangers {
		err := fmt.Errorf("%w: too many %s: %d in all, %d of %s", registry.ErrUnavailable, b.what, b.taken, b.hosts[r.Host], r.Host)
		return nil, &registry.RetryError{Err: err, After: time.Second}
	}
	b.count(r.Host, stranger, 1)
	return sync.OnceFunc(func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.count(r.Host, stranger, -1)
	}), nil
}

// count adds n. The caller holds b.mu.
func (b *Budget) count(host string, stranger bool, n int) {
	b.taken += n
	if stranger {
		b.named += n
	}
	if b.hosts[host] += n; b.hosts[host] == 0 {
		delete(b.hosts, host)
	}
}
