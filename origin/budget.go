package origin

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/cluster"

	"kraken/proto/transport"
)

const (
	// fetchWithin is how long a leased piece is kept for who leased it: agents lease what they read in a fraction
	// of a second. Then it is given to another, and counts against who leased it until leaseFor has passed.
	fetchWithin = 2 * time.Second
	// newcomers is how many pieces all agents of one source that have not fetched anything yet may have leased, or
	// wait for, at once. It grows by what they fetch, up to maxNewcomers.
	newcomers, maxNewcomers = 16, 256
	// known is how many pieces an agent may have leased at once that has fetched one; each piece that it fetches
	// adds grows, up to maxKnown.
	known, grows, maxKnown = 8, 2, 8192
	// budgetIdle is how long an agent or a source is remembered that does nothing.
	budgetIdle = time.Minute
	// maxSources and maxAgents, of a source, bound what is remembered. Who comes when there are so many shares the
	// budget of newcomers.
	maxSources, maxAgents = 4096, 4096
)

// asker is who leases and fetches. The source is where a request really comes from; the peer id is a claim.
type asker struct{ source, peer string }

// share is the asker's name in the turns: nobody can spend the share of another source's agent.
func (a asker) share() string { return a.source + " " + a.peer }

type askerKey struct{}

// withAsker lets a read of a range know who asks.
func withAsker(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && r.Header.Get("Range") != "" {
			peer := r.Header.Get(cluster.PeerHeader)
			if len(peer) > maxPeer {
				peer = ""
			}
			r = r.WithContext(context.WithValue(r.Context(), askerKey{}, asker{sourceOf(r), peer}))
		}
		next.ServeHTTP(w, r)
	})
}

// maxPeer is the length of a peer id in hex digits.
const maxPeer = 40

// sourceOf returns where a request comes from: the identity in the client's certificate, or the certificate, where it
// has one, else its address; of IPv6 the network, as one host has 2^64 addresses.
func sourceOf(r *http.Request) string {
	if p, ok := cluster.Caller(r.Context()); ok && p.ID != "" {
		return p.String()
	}
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		sum := sha256.Sum256(r.TLS.PeerCertificates[0].Raw)
		return hex.EncodeToString(sum[:])
	}
	return transport.SourceOf(r.RemoteAddr)
}

// budgets bound what is leased and not fetched. Leases cost nothing to ask for, and a piece that was leased is kept
// from all others, so each source may hold few that it has not fetched, and fewer with each that it lets expire. An
// agent that fetches has a budget of its own, which grows as fast as it fetches; so agents behind one address don't
// share one, and whoever only leases shares with his like.
type budgets struct {
	mu      sync.Mutex
	sources map[string]*source
}

// source is an address or a certificate.
type source struct {
	newcomers *budget
	agents    map[string]*budget // by peer id: those that have fetched
	used      time.Time
}

// budget is how many pieces may be leased and not fetched.
type budget struct {
	allowed int
	waiting int // requests for a lease
	open    []*loan
	halved  time.Time
	used    time.Time
}

// loan is a piece that was leased and not fetched.
type loan struct {
	digest  digest.Digest
	piece   int
	peer    string
	at      time.Time
	reading bool
	read    bool // it is fetched, or was cut: to be taken from its budget
	late    bool
}

func newBudgets() *budgets { return &budgets{sources: map[string]*source{}} }

// source returns the source of an asker. The caller holds mu.
func (x *budgets) source(a asker, now time.Time) *source {
	s := x.sources[a.source]
	if s == nil && len(x.sources) >= maxSources {
		a.source = ""
		s = x.sources[a.source]
	}
	if s == nil {
		s = &source{newcomers: &budget{allowed: newcomers, used: now}, agents: map[string]*budget{}}
		x.sources[a.source] = s
	}
	s.used = now
	return s
}

// agent returns the budget that an asker's leases count in. The caller holds the lock of the budgets.
func (s *source) agent(peer string, now time.Time) *budget {
	b := s.agents[peer]
	if b == nil {
		b = s.newcomers
	}
	b.used = now
	b.expire(now)
	return b
}

// expire halves the budget when leases were not fetched in time, once for all that expire together, and forgets old
// ones.
func (b *budget) expire(now time.Time) {
	b.open = slices.DeleteFunc(b.open, func(l *loan) bool {
		age := now.Sub(l.at)
		if !l.reading && !l.late && age > fetchWithin {
			l.late = true
			b.halve(now)
		}
		return !l.reading && age > leaseFor
	})
}

func (b *budget) halve(now time.Time) {
	if now.Sub(b.halved) >= fetchWithin {
		b.allowed, b.halved = max(1, b.allowed/2), now
	}
}

// doubtful reports whether all that is known of the budget lately is leases that were not fetched.
func (b *budget) doubtful() bool { return b.allowed <= 1 }

// late reports whether the budget is as small as it is because leases were not fetched.
func (b *budget) late() bool {
	return slices.ContainsFunc(b.open, func(l *loan) bool { return l.late })
}

// enter begins a request for a lease of up to most pieces and returns how many it may be; leave ends it. None: refused
// says that leases were not fetched in time, else there are only many who ask. doubtful: others come first.
func (x *budgets) enter(a asker, most int) (n int, doubtful, refused bool, leave func()) {
	x.mu.Lock()
	defer x.mu.Unlock()
	b := x.source(a, time.Now()).agent(a.peer, time.Now())
	if n = min(most, b.allowed-len(b.open)-b.waiting); n <= 0 {
		return 0, b.doubtful(), b.late(), nil
	}
	b.waiting++
	return n, b.doubtful(), false, func() {
		x.mu.Lock()
		defer x.mu.Unlock()
		b.waiting--
	}
}

// lend notes what was leased.
func (x *budgets) lend(a asker, d digest.Digest, pieces []int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	now := time.Now()
	b := x.source(a, now).agent(a.peer, now)
	for _, i := range pieces {
		b.open = append(b.open, &loan{digest: d, piece: i, peer: a.peer, at: now})
	}
}

// reading notes that an asker reads the pieces from first to last. The result is to be called when that has ended:
// whole says that all of it was sent. Only what was sent counts as fetched, whether it was leased or not.
func (x *budgets) reading(a asker, d digest.Digest, first, last int) (ended func(whole bool)) {
	x.mu.Lock()
	defer x.mu.Unlock()
	var mine []*loan
	s := x.source(a, time.Now())
	for _, b := range s.holders(a.peer) {
		for _, l := range b.open {
			if l.digest == d && l.piece >= first && l.piece <= last && (a.peer == "" || l.peer == a.peer) {
				l.reading = true
				mine = append(mine, l)
				a.peer = l.peer // a client that does not say who it is
			}
		}
	}
	return func(whole bool) { x.read(a, mine, last-first+1, whole) }
}

// holders are the budgets that leases of an agent may be in; of one whose id is not known, all.
func (s *source) holders(peer string) []*budget {
	out := []*budget{s.newcomers}
	for id, b := range s.agents {
		if peer == "" || id == peer {
			out = append(out, b)
		}
	}
	return out
}

func (x *budgets) read(a asker, loans []*loan, pieces int, whole bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	now := time.Now()
	s := x.source(a, now)
	for _, l := range loans { // marked, because thousands of each are no rarity
		l.read = true
	}
	drop := func(l *loan) bool { return l.read }
	if had := len(s.newcomers.open); had > 0 {
		s.newcomers.open = slices.DeleteFunc(s.newcomers.open, drop)
		if whole {
			s.newcomers.allowed = min(s.newcomers.allowed+had-len(s.newcomers.open), maxNewcomers)
		}
	}
	b := s.agents[a.peer]
	switch {
	case b == nil && !whole:
		if len(loans) > 0 {
			s.newcomers.halve(now)
		}
		return
	case b == nil && (a.peer == "" || len(s.agents) >= maxAgents):
		return
	case b == nil:
		b = &budget{allowed: known}
		s.agents[a.peer] = b
	}
	b.used = now
	b.open = slices.DeleteFunc(b.open, drop)
	if !whole {
		if len(loans) > 0 {
			b.halve(now)
		}
		return
	}
	b.allowed = min(b.allowed+grows*pieces, maxKnown)
}

// forget drops agents and sources that did nothing lately.
func (x *budgets) forget() {
	x.mu.Lock()
	defer x.mu.Unlock()
	limit := time.Now().Add(-budgetIdle)
	for name, s := range x.sources {
		for peer, b := range s.agents {
			if b.used.Before(limit) && b.waiting == 0 {
				delete(s.agents, peer)
			}
		}
		if s.used.Before(limit) && s.newcomers.waiting == 0 && len(s.agents) == 0 {
			delete(x.sources, name)
		}
	}
}
