package store

import (
	"sync"
	"testing"
	"testing/synctest"
)

// A change after C was taken wakes who waits, also before it waits; one before that does not.
func TestSignal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s Signal
		s.Wake() // nobody waits
		early := s.C()
		select {
		case <-early:
			t.Error("a change of the past wakes")
		default:
		}
		var wg sync.WaitGroup
		for range 3 {
			c := s.C()
			wg.Go(func() { <-c })
		}
		synctest.Wait()
		s.Wake()
		wg.Wait()
		<-early
		select {
		case <-s.C():
			t.Error("it stays awake")
		default:
		}
	})
}
