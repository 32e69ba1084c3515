package origin

import (
	"context"
	"math/rand/v2"
	"net/http"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/ring"
)

// uplink is an origin without disk or network that sends pieces at a rate, one after another.
type uplink struct {
	*Origin
	m    *blob.Metainfo
	rate int // bytes a second
	busy chan struct{}
}

func newUplink(t *testing.T, pieces, rate int) *uplink {
	t.Helper()
	origins, err := cluster.NewOrigins([]ring.Member{{ID: "o", URL: "http://127.0.0.1:1"}}, 1, time.Minute, http.DefaultClient)
	if err != nil {
		t.Fatal(err)
	}
	o := &Origin{cfg: Config{ID: "o"}, origins: origins, leases: newLeases(64), turns: newTurns(), budgets: newBudgets()}
	o.leases.spread = o.turns.spread
	return &uplink{Origin: o, m: metainfoOf(t, pieces), rate: rate, busy: make(chan struct{}, 1)}
}

// read sends a piece, leased or not.
func (u *uplink) read(who asker, i int) {
	ended := u.budgets.reading(who, u.m.Digest, i, i)
	u.leases.sending(u.m.Digest, registry.Range{Offset: int64(i) * u.m.PieceLength(), Length: u.m.PieceLength()}, u.m.Size)
	sent := u.turns.beginSend(u.m.PieceLength())
	u.busy <- struct{}{}
	time.Sleep(time.Duration(u.m.PieceLength()) * time.Second / time.Duration(u.rate))
	<-u.busy
	sent()
	ended(true)
}

// pull is an agent that leases as ours do, alone or in a crowd that does not trade, and reads what it leased. It
// returns how long it took.
func (u *uplink) pull(t *testing.T, who asker) time.Duration {
	began := time.Now()
	have, mu := blob.NewBitmap(u.m.NumPieces()), sync.Mutex{}
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for size, held := 1, 0; ; {
				mu.Lock()
				asked := have.Clone()
				mu.Unlock()
				left := asked.Len() - asked.Count()
				if left == 0 || time.Since(began) > 10*time.Minute {
					return
				}
				out, err := u.lease(t.Context(), u.leases, u.m, asked, who, cluster.LeaseRequest{Max: size, Stalled: true, Alone: true})
				if held++; err != nil || !out.HeldBack {
					held = 0
				}
				if held >= 4 { // without a lease
					i, _ := anyMissing(asked)
					out.Pieces, out.RetryAfter = []int{i}, 0
				}
				for _, i := range out.Pieces {
					u.read(who, i)
					mu.Lock()
					have.Set(i)
					mu.Unlock()
				}
				if len(out.Pieces) == size {
					size = min(2*size, 128)
				}
				if len(out.Pieces) == 0 {
					time.Sleep(max(out.RetryAfter, 50*time.Millisecond))
				}
			}
		})
	}
	wg.Wait()
	return time.Since(began)
}

// attack leases with invented peer ids, 66 requests at a time, and fetches nothing.
func (u *uplink) attack(ctx context.Context, source string) (wait func()) {
	var wg sync.WaitGroup
	for range 66 {
		wg.Go(func() {
			for ctx.Err() == nil {
				who := asker{source, strconv.FormatUint(rand.Uint64(), 16)}
				out, err := u.lease(ctx, u.leases, u.m, blob.NewBitmap(u.m.NumPieces()), who, cluster.LeaseRequest{Max: 256, Want: []int{0, 1, 2}, Alone: true})
				if err != nil || len(out.Pieces) == 0 {
					time.Sleep(5 * time.Millisecond)
				}
			}
		})
	}
	return wg.Wait
}

// One who leases and fetches nothing does not keep others from their pieces for long, not even from behind the same
// address.
func TestLeasesThatNobodyFetches(t *testing.T) {
	for name, source := range map[string]string{"from another address": "10.6.6.6", "from the same address": "10.0.0.1"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := newUplink(t, 768, 70<<20)
				ctx, stop := context.WithCancel(t.Context())
				wait := u.attack(ctx, source)
				time.Sleep(time.Second)
				took := u.pull(t, asker{"10.0.0.1", "agent"})
				stop()
				wait()
				if limit := 4 * time.Second; took > limit {
					t.Errorf("96 MiB took %s beside somebody who leases and fetches nothing, want at most %s; alone it is 1.4 s", took, limit)
				}
			})
		})
	}
}

// Agents behind one address that fetch what they lease get it as soon as others.
func TestAgentsBehindOneAddress(t *testing.T) {
	const agents = 24
	crowd := func(source func(i int) string) (took time.Duration) {
		synctest.Test(t, func(t *testing.T) {
			u := newUplink(t, 64, 70<<20)
			began := time.Now()
			var wg sync.WaitGroup
			for i := range agents {
				wg.Go(func() { u.pull(t, asker{source(i), strconv.Itoa(i)}) })
			}
			wg.Wait()
			took = time.Since(began)
		})
		return took
	}
	apart := crowd(func(i int) string { return "10.0.0." + strconv.Itoa(i) })
	together := crowd(func(int) string { return "10.0.0.1" })
	if together > apart*11/10+100*time.Millisecond {
		t.Errorf("%d agents behind one address took %s, behind as many %s", agents, together, apart)
	}
}

// A source's budget is halved when leases expire, once for all that expire together, and grows as it fetches.
func TestBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x, m := newBudgets(), metainfoOf(t, 8)
		lease := func(peer string, pieces ...int) (n int, refused bool) {
			n, _, refused, leave := x.enter(asker{"s", peer}, len(pieces))
			if n > 0 {
				x.lend(asker{"s", peer}, m.Digest, pieces[:n])
				leave()
			}
			return n, refused
		}
		for range newcomers {
			if n, _ := lease("new", 0); n != 1 {
				t.Fatal("a newcomer was refused")
			}
		}
		if n, refused := lease("new", 1); n != 0 || refused {
			t.Errorf("%d pieces, refused %v: there is room no more, and nobody is to blame yet", n, refused)
		}
		time.Sleep(fetchWithin + time.Millisecond)
		if n, refused := lease("new", 1); n != 0 || !refused {
			t.Errorf("%d pieces, refused %v, after leases expired", n, refused)
		}
		if b := x.sources["s"].newcomers; b.allowed != newcomers/2 {
			t.Errorf("%d pieces are allowed after leases expired, want %d", b.allowed, newcomers/2)
		}
		x.reading(asker{"s", "reader"}, m.Digest, 3, 3)(true) // without a lease
		if n, _ := lease("reader", 1, 2, 3, 4); n != 4 {
			t.Errorf("who has fetched may lease %d pieces, want 4", n)
		}
		x.reading(asker{"s", "reader"}, m.Digest, 1, 4)(true)
		b := x.sources["s"].agents["reader"]
		if len(b.open) != 0 || b.allowed != known+5*grows {
			t.Errorf("%d pieces are on loan and %d allowed after all were fetched", len(b.open), b.allowed)
		}
		lease("reader", 1, 2)
		x.reading(asker{"s", "reader"}, m.Digest, 1, 2)(false)
		if b.allowed != (known+5*grows)/2 {
			t.Errorf("%d pieces are allowed after a read that was broken off", b.allowed)
		}
		time.Sleep(2 * budgetIdle)
		x.forget()
		x.forget()
		if len(x.sources) != 0 {
			t.Errorf("%d sources are remembered that did nothing", len(x.sources))
		}
	})
}
