package store

import "sync"

// Signal wakes all who wait for something to change, again and again. The zero value is ready, and all its methods may
// be called at once.
//
// Who waits takes C before it looks at what changes: so no change between the look and the wait is missed.
type Signal struct {
	mu sync.Mutex
	c  chan struct{} // nil while nobody waits
}

// C returns a channel that the next Wake closes.
func (s *Signal) C() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.c == nil {
		s.c = make(chan struct{})
	}
	return s.c
}

// Wake closes the channel that C returned, for all who have it.
func (s *Signal) Wake() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.c != nil {
		close(s.c)
		s.c = nil
	}
}
