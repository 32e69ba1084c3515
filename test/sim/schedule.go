package sim

import (
	"slices"
	"testing/synctest"
	"time"

	"kraken/proto/layout"
	"kraken/proto/ring"

	"github.com/opencontainers/go-digest"
)

// What follows is for schedules that are written down, in the place of a plan that a seed made. After each step the
// rule of debts is checked.

// Up starts everything and waits until it is ready.
func (s *Sim) Up() {
	s.heal()
	if err := await(time.Minute, s.owing); err != nil {
		s.history.violate("stuck", "a fresh cluster: %v", err)
	}
}

// Wait lets time pass.
func (s *Sim) Wait(d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		time.Sleep(min(time.Second, time.Until(end)))
		synctest.Wait()
		s.supervise()
		s.checkDebts()
	}
}

// Kill ends an origin as kill -9 does.
func (s *Sim) Kill(origin int) { s.do(Kill, s.origins[origin]) }

// Start starts an origin.
func (s *Sim) Start(origin int) { s.do(Start, s.origins[origin]) }

// Wipe kills an origin and gives it an empty disk.
func (s *Sim) Wipe(origin int) { s.do(Wipe, s.origins[origin]) }

// WipeIndex kills build-index, and starts it with nothing.
func (s *Sim) WipeIndex() {
	s.do(Wipe, s.index)
	s.do(Start, s.index)
}

func (s *Sim) do(a Action, n *node) {
	synctest.Wait()
	s.history.note("%s %s", a, n.name)
	s.disturb(Step{Do: a}, n, n)
	synctest.Wait()
	s.checkDebts()
}

// order is the numbers of the origins in rendezvous order.
func (s *Sim) order(b []byte) (out []int) {
	ids := make([]string, len(s.members))
	for i, m := range s.members {
		ids[i] = m.ID
	}
	for _, id := range ring.New(ids, s.Replicas).Order(digest.FromBytes(b)) {
		out = append(out, slices.Index(ids, id))
	}
	return out
}

// put puts other bytes into the bucket under the digest of b.
func (m *memory) put(b, bytes []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.objects[layout.BlobKey(digest.FromBytes(b))] = bytes
}
