package origin

import (
	"errors"
	"testing"
	"time"

	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// One build-index at a time has the lease, until its end or until it lets go. The highest generation of those who had
// it is remembered, also by the next process.
func TestHolder(t *testing.T) {
	o, c := keeper(t, nil)
	ask := func(holder string, length time.Duration, generation int64, want cluster.HolderResponse) {
		t.Helper()
		got, err := c.Hold(t.Context(), cluster.HolderRequest{Holder: holder, For: length, Generation: generation})
		if err != nil || got.Holder != want.Holder || got.Generation != want.Generation || (got.Left > 0) != (want.Left > 0) {
			t.Errorf("%s asks: %+v, %v; want %+v", holder, got, err, want)
		}
	}
	ask("a", time.Minute, 5, cluster.HolderResponse{Holder: "a", Generation: 5})
	ask("b", time.Minute, 9, cluster.HolderResponse{Holder: "a", Generation: 5, Left: 1})
	ask("a", time.Minute, 7, cluster.HolderResponse{Holder: "a", Generation: 7})
	ask("a", 0, 7, cluster.HolderResponse{Holder: "a", Generation: 7})
	ask("b", time.Minute, 6, cluster.HolderResponse{Holder: "b", Generation: 7})
	o.holder.until = time.Now() // its lease ends
	ask("a", time.Minute, 8, cluster.HolderResponse{Holder: "a", Generation: 8})
	o.holder = holder{} // a restart
	ask("b", time.Minute, 0, cluster.HolderResponse{Holder: "b", Generation: 8})
	if n := held(t, c); n != 0 {
		t.Errorf("it counts as %d records", n)
	}
	for _, bad := range []cluster.HolderRequest{
		{}, {Holder: "a", For: -1}, {Holder: "a", For: 2 * cluster.MaxHolderLease}, {Holder: "a", Generation: -1},
		{Holder: "a", Generation: time.Now().Add(2 * cluster.MaxGenerationSkew).UnixMicro()},
	} {
		if _, err := c.Hold(t.Context(), bad); err == nil || errors.Is(err, registry.ErrUnavailable) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}
