package access

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kraken/proto/cluster"
)

// Callers who need what is not known yet make one request each 250 ms, whether these fail or not, and each of them gets
// the outcome of one that was sent after it came.
func TestRefreshGap(t *testing.T) {
	for _, fails := range []error{nil, errors.New("away")} {
		synctest.Test(t, func(t *testing.T) {
			var asked atomic.Int64
			s := NewState(func(context.Context, cluster.AccessState) (cluster.AccessState, error) {
				asked.Add(1)
				time.Sleep(time.Millisecond)
				return cluster.AccessState{}, fails
			}, time.Hour, slog.New(slog.DiscardHandler))
			var callers sync.WaitGroup
			for range 100 {
				callers.Go(func() {
					_, ok, err := s.FindRobot(t.Context(), "ci", func(cluster.Robot) bool { return true })
					if ok || (err != nil) != (fails != nil) {
						t.Errorf("found %v, %v", ok, err)
					}
				})
				time.Sleep(10 * time.Millisecond)
			}
			callers.Wait()
			if n := asked.Load(); n > 6 {
				t.Errorf("build-index was asked %d times in a second (fails: %v)", n, fails)
			}
		})
	}
}
