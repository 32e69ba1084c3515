package origin

import (
	"context"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

const turnPiece = 128 << 10

// drain sends what is leased at a rate, piece by piece, until nothing is left on its way.
func (t *turns) drain(rate int) {
	for {
		synctest.Wait()
		t.mu.Lock()
		pending := t.pending
		t.mu.Unlock()
		if pending == 0 {
			return
		}
		sent := t.beginSend(turnPiece)
		time.Sleep(time.Duration(turnPiece * int(time.Second) / rate))
		sent()
	}
}

func (t *turns) atOnce() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.pending
}

// A crowd that asks at once over a slow uplink is answered one after another, in the order of asking.
func TestTurnsOnASlowUplink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const agents, rate = 16, 3 << 20
		x := newTurns()
		got := make(chan int, agents)
		for i := range agents {
			go func() {
				if n := x.take(t.Context(), strconv.Itoa(i), turnPiece, 8); n < 1 || n*turnPiece > initialWindow {
					t.Errorf("agent %d may lease %d pieces, want 1 or 2", i, n)
				}
				got <- i
			}()
			synctest.Wait()
			if n := x.atOnce(); n > initialWindow {
				t.Fatalf("%d bytes are on their way while the uplink's rate is not known, want at most %d", n, initialWindow)
			}
		}
		x.drain(rate)
		close(got)
		var order []int
		for i := range got {
			order = append(order, i)
		}
		if len(order) != agents || !slices.IsSorted(order) {
			t.Errorf("turns came to agents %v, want all in the order of asking", order)
		}
		if w, most := x.window(), int64(rate/2); w > most {
			t.Errorf("%d bytes would be leased ahead, want at most half a second of the uplink, %d", w, most)
		}
	})
}

// Leases that are sent side by side end in bunches. That does not make the uplink seem faster than it is.
func TestTurnsThatEndInBunches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const piece, rate, each = 512 << 10, 12 << 20, 6
		x := newTurns()
		var open []func()
		for range each {
			open = append(open, x.beginSend(piece))
		}
		for range 80 {
			for _, n := range []int{1, each - 1} {
				time.Sleep(each * piece * time.Second / rate / 2)
				for range n {
					next := x.beginSend(piece)
					open[0]()
					open = append(open[1:], next)
				}
			}
		}
		for _, sent := range open {
			sent()
		}
		if w, want := x.window(), int64(rate*ahead.Seconds()); w < want || w > want*5/4 {
			t.Errorf("%d bytes would be leased ahead, want %d or little more", w, want)
		}
	})
}

// What is leased ahead is a quarter of a second's worth. On slow links it is more, for connections begin slowly, but
// not more than a second's.
func TestTurnsAhead(t *testing.T) {
	for rate, want := range map[float64]int64{
		0: initialWindow, 100 << 10: initialWindow, 500 << 10: 500 << 10, 1 << 20: leastAhead, 3 << 20: leastAhead, 40 << 20: 10 << 20,
	} {
		x := newTurns()
		x.rate = rate
		if n := x.window(); n != want {
			t.Errorf("at %.0f bytes a second %d are leased ahead, want %d", rate, n, want)
		}
	}
}

// A lease that has run out and is sent all the same does not make the uplink seem faster than it is.
func TestTurnsSentAfterTheyRanOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size, takes = 4 << 20, 4
		x := newTurns()
		late := x.beginSend(size)
		time.Sleep((takes - 1) * time.Second)
		x.mu.Lock()
		x.expire(time.Now())
		left := len(x.open)
		x.mu.Unlock()
		if left > 0 {
			t.Fatal("it has not run out")
		}
		next := x.beginSend(1)
		time.Sleep(time.Second)
		late()
		next()
		if x.rate == 0 || x.rate > size/takes {
			t.Errorf("the rate is %.0f bytes a second, want at most %d", x.rate, size/takes)
		}
	})
}

// On a fast uplink nobody waits once its rate is known, which is soon, also when somebody slow came first.
func TestTurnsOnAFastUplink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newTurns()
		x.take(t.Context(), "slow", turnPiece, 1)
		sent := x.beginSend(turnPiece)
		time.Sleep(time.Second)
		sent()
		for range 400 {
			n := x.take(t.Context(), "a", turnPiece, 8)
			sent := x.beginSend(int64(n) * turnPiece)
			time.Sleep(time.Millisecond)
			sent()
		}
		began := time.Now()
		for i := range 100 {
			if n := x.take(t.Context(), strconv.Itoa(i), turnPiece, 4); n != 4 {
				t.Fatalf("agent %d may lease %d pieces, want 4", i, n)
			}
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("a hundred agents waited for %s, want no time", took)
		}
	})
}

// shares runs agents that lease one piece after another over a slow uplink, slow ones through a link of their own that
// needs long for each, and returns what each got in a time.
func shares(t *testing.T, x *turns, d time.Duration, slow ...bool) []int {
	const rate = 3 << 20
	got := make([]int, len(slow))
	end := time.Now().Add(d)
	uplink := make(chan struct{}, 1)
	var wg sync.WaitGroup
	for i, slow := range slow {
		for range 2 { // requests at a time
			wg.Go(func() {
				for time.Now().Before(end) {
					n := x.take(t.Context(), strconv.Itoa(i), turnPiece, 1)
					if n == 0 {
						continue
					}
					sent := x.beginSend(turnPiece)
					uplink <- struct{}{}
					time.Sleep(time.Duration(turnPiece * int(time.Second) / rate))
					<-uplink
					if slow {
						time.Sleep(500 * time.Millisecond)
					}
					sent()
					x.mu.Lock()
					got[i]++
					x.mu.Unlock()
				}
			})
		}
	}
	wg.Wait()
	return got
}

// An agent that needs longer for each piece gets as many as the others, as far as it can take them: what it does not
// lease it can't trade, and its uplink is of no use to the swarm.
func TestTurnsAreShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		got := shares(t, newTurns(), 40*time.Second, true, true, false, false, false, false, false, false, false, false, false, false)
		if least, most := slices.Min(got), slices.Max(got); float64(least) < 0.9*float64(most) {
			t.Errorf("agents got %v pieces, want nearly equal shares", got)
		}
	})
}

// An agent that comes later has as many turns as those that were there, not all until it has caught up. One that has
// fallen behind catches up by credit at most.
func TestTurnsOfOneWhoComesLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const late = 8
		x := newTurns()
		shares(t, x, time.Minute, make([]bool, late)...)
		got := shares(t, x, time.Minute, make([]bool, late+1)...)
		if least, most := slices.Min(got), slices.Max(got); float64(least) < 0.9*float64(most) {
			t.Errorf("agents got %v pieces, the last of them came later; want equal shares", got)
		}
		x.mu.Lock()
		x.level += 1 << 30
		for i := range late {
			x.shares[strconv.Itoa(i)].leased = x.level
		}
		x.mu.Unlock()
		got = shares(t, x, time.Minute, make([]bool, late+1)...)
		if more := int64(got[late]-got[0]) * turnPiece; more < credit*3/4 || more > credit*5/4 {
			t.Errorf("who has fallen behind by 1 GiB got %d bytes more, want about %d", more, credit)
		}
	})
}

// What an agent gives back of its turn is not held against it.
func TestTurnsThatAreNotUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newTurns()
		turn := func(agent string) func() {
			x.take(t.Context(), agent, turnPiece, 1)
			return x.beginSend(turnPiece)
		}
		turn("other")()
		x.take(t.Context(), "modest", turnPiece, 1)
		x.unused("modest", turnPiece)
		busy := turn("busy")
		x.mu.Lock()
		x.pending += 1 << 30 // there is room for nobody
		x.mu.Unlock()
		got := make(chan string, 2)
		for _, agent := range []string{"busy", "modest"} {
			go func() {
				x.take(t.Context(), agent, turnPiece, 1)
				got <- agent
				time.Sleep(time.Minute)
			}()
			synctest.Wait()
		}
		x.mu.Lock()
		x.pending -= 1<<30 - x.window() + turnPiece // for one
		x.mu.Unlock()
		busy()
		if first := <-got; first != "modest" {
			t.Errorf("the turn came to %q, want the one who has leased nothing", first)
		}
		time.Sleep(2 * time.Minute)
	})
}

// Agents beyond the number whose shares are kept don't keep the others from their turns.
func TestTurnsOfTooManyAgents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newTurns()
		x.take(t.Context(), "known", turnPiece, 1)
		x.beginSend(turnPiece)()
		x.mu.Lock()
		for i := range maxShares {
			x.shares["full "+strconv.Itoa(i)] = &share{waiting: 1}
		}
		x.shares["known"].leased += 3 * turnPiece
		x.mu.Unlock()
		ctx, stop := context.WithCancel(t.Context())
		uplink := make(chan struct{}, 1)
		var wg sync.WaitGroup
		for i := range 32 { // never without one that waits
			wg.Go(func() {
				time.Sleep(time.Duration(i) * 37 * time.Millisecond) // they don't all give up at one moment
				for k := 0; ctx.Err() == nil; k++ {
					if n := x.take(ctx, strconv.Itoa(i)+" "+strconv.Itoa(k), turnPiece, 1); n > 0 {
						sent := x.beginSend(turnPiece)
						uplink <- struct{}{}
						time.Sleep(100 * time.Millisecond)
						<-uplink
						sent()
					}
				}
			})
		}
		time.Sleep(1500 * time.Millisecond)
		x.mu.Lock()
		x.shares["known"].left = time.Now()
		x.mu.Unlock()
		n := 0
		for range 10 {
			n += x.take(ctx, "known", turnPiece, 1)
		}
		if n == 0 {
			t.Error("no turn in ten seconds for one whose share is known")
		}
		stop()
		wg.Wait()
	})
}

// Whoever waits in vain is told to ask again, and has its place when it does.
func TestTurnsKeepPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newTurns()
		if n := x.take(t.Context(), "sending", turnPiece, 2); n != 2 {
			t.Fatalf("the first may lease %d pieces, want 2", n)
		}
		sent := x.beginSend(2 * turnPiece)
		x.mu.Lock()
		x.open[0].until = time.Now().Add(time.Hour) // slow, not gone
		x.mu.Unlock()
		if n := x.take(t.Context(), "early", turnPiece, 1); n != 0 {
			t.Fatalf("%d pieces, want none while the uplink has enough to do", n)
		}
		got := make(chan string, 2)
		wait := func(agent string) {
			x.take(t.Context(), agent, turnPiece, 1)
			got <- agent
			time.Sleep(time.Minute) // whose turn came is being served
		}
		go wait("late")
		synctest.Wait()
		go wait("early")
		synctest.Wait()
		sent()
		if first := <-got; first != "early" {
			t.Errorf("the turn came to %q, want the one who has waited for longer", first)
		}
		time.Sleep(2 * time.Minute)
	})
}

// An agent that leases and is gone before or while it fetches keeps the others waiting for a moment only.
func TestTurnsOfOneWhoIsGone(t *testing.T) {
	for _, tc := range []struct {
		name    string
		fetches bool
		limit   time.Duration
	}{{"before", false, fetchLimit}, {"while it fetches", true, turnLimit}} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := newTurns()
				x.take(t.Context(), "gone", turnPiece, 2)
				if tc.fetches {
					defer x.beginSend(2 * turnPiece)() // long after
				}
				began, n := time.Now(), 0
				for n == 0 {
					n = x.take(t.Context(), "next", turnPiece, 1)
				}
				if took := time.Since(began); took != tc.limit {
					t.Errorf("the next one waited for %s, want %s", took, tc.limit)
				}
				if n := x.atOnce(); n != turnPiece {
					t.Errorf("%d bytes are on their way, want one piece", n)
				}
			})
		})
	}
}

// One short transfer over a fast uplink is enough to know that nobody has to wait.
func TestTurnsAfterAShortTransfer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newTurns()
		for range 2 {
			x.take(t.Context(), "a", 2<<20, 1)
			sent := x.beginSend(2 << 20)
			time.Sleep(5 * time.Millisecond)
			sent()
			time.Sleep(time.Minute) // rest says nothing about the uplink
		}
		for i := range 8 {
			began := time.Now()
			if n := x.take(t.Context(), strconv.Itoa(i), 2<<20, 1); n != 1 || time.Since(began) != 0 {
				t.Errorf("agent %d has to wait for its turn", i)
			}
		}
	})
}

// A piece that is longer than what is leased ahead goes out all the same, and what is not leased of a turn is free at
// once.
func TestTurnsOfLargePieces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newTurns()
		if n := x.take(t.Context(), "a", 16<<20, 4); n != 1 {
			t.Fatalf("%d pieces, want 1", n)
		}
		x.unused("a", 16<<20)
		if n := x.take(t.Context(), "b", 16<<20, 4); n != 1 {
			t.Fatalf("%d pieces, want 1", n)
		}
	})
}

// Where one agent leases large pieces the uplink does not rest between them, although they are larger than the window;
// when others come all keep to that.
func TestTurnsOfALoneAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const piece, rate = 2 << 20, 8 << 20
		x := newTurns()
		asked := func(agent string) chan int {
			got := make(chan int, 1)
			go func() { got <- x.take(t.Context(), agent, piece, 1) }()
			synctest.Wait()
			return got
		}
		send := func() {
			sent := x.beginSend(piece)
			time.Sleep(piece * time.Second / rate)
			sent()
			synctest.Wait()
		}
		for range 4 { // the rate is known
			if n := <-asked("a"); n != 1 {
				t.Fatalf("a may lease %d pieces, want 1", n)
			}
			send()
		}
		if w := x.window(); w > piece {
			t.Fatalf("the window is %d, and larger than a piece", w)
		}
		first, second, third := asked("a"), asked("a"), asked("a")
		if len(first) != 1 || len(second) != 1 || len(third) != 0 {
			t.Errorf("of three requests %d, %d, %d are answered, want the first two", len(first), len(second), len(third))
		}
		send()
		if len(third) != 1 {
			t.Error("the third is not answered when a piece was sent")
		}
		send()
		send()
		b := asked("b")
		next := asked("a")
		if len(b) != 1 || len(next) != 0 {
			t.Errorf("b has %d answers and a has %d, want b alone: the window is full", len(b), len(next))
		}
		send()
		<-next
		send()
	})
}
