package rate

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
)

// TestWaitingForTurns runs in a bubble, so the times are exact.
func TestWaitingForTurns(t *testing.T) {
	const rate = 10 << 20 // bursts are 1 MiB
	for _, c := range []struct {
		name  string
		rates Limits
		up    bool
		blobs []string // one sender each, of 10 MiB
		want  time.Duration
	}{
		{"unlimited", Limits{}, true, []string{"a", "b"}, 0},
		{"one", Limits{UploadRate: rate}, true, []string{"a"}, 900 * time.Millisecond},
		{"four share", Limits{UploadRate: rate}, true, []string{"a", "a", "b", "c"}, 3900 * time.Millisecond},
		{"each blob", Limits{BlobUploadRate: rate}, true, []string{"a", "b", "c"}, 900 * time.Millisecond},
		{"of one blob share", Limits{BlobUploadRate: rate}, true, []string{"a", "a"}, 1900 * time.Millisecond},
		{"both limits", Limits{UploadRate: 2 * rate, BlobUploadRate: rate}, true, []string{"a", "b", "c", "d"}, 1950 * time.Millisecond},
		{"the other direction", Limits{UploadRate: rate}, false, []string{"a"}, 0},
		{"down", Limits{DownloadRate: rate}, false, []string{"a", "b"}, 1900 * time.Millisecond},
		{"each blob down", Limits{BlobDownloadRate: rate}, false, []string{"a", "b", "c"}, 900 * time.Millisecond},
		{"of one blob share, down", Limits{BlobDownloadRate: rate}, false, []string{"a", "a"}, 1900 * time.Millisecond},
		{"burst is bounded", Limits{UploadRate: 100 * rate}, true, []string{"a"}, 9 * time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := NewLimiter(c.rates)
				wait := l.WaitDown
				if c.up {
					wait = l.WaitUp
				}
				began := time.Now()
				var wg sync.WaitGroup
				for _, b := range c.blobs {
					wg.Go(func() {
						for range 10 << 20 / (64 << 10) {
							if !wait(nil, digest.FromString(b), 64<<10) {
								t.Error("did not get its turn")
							}
						}
					})
				}
				wg.Wait()
				if took := time.Since(began); (took - c.want).Abs() > 5*time.Millisecond {
					t.Errorf("took %s, want %s", took, c.want)
				}
			})
		})
	}
	synctest.Test(t, func(t *testing.T) { // a waiter leaves, and one sees the limit go
		l := NewLimiter(Limits{UploadRate: Min})
		gone := make(chan struct{})
		left := make(chan bool)
		go func() { left <- l.WaitUp(gone, "", 10<<20) }()
		synctest.Wait()
		close(gone)
		if <-left {
			t.Error("who has gone got all its turns")
		}
		began := time.Now()
		go func() { left <- l.WaitUp(nil, "", 10<<20) }()
		time.Sleep(time.Second)
		l.set(Limits{})
		if !<-left || time.Since(began) > time.Second {
			t.Error("the lifted limit still holds")
		}
	})
}

// TestHTTPAndPeersShareTheUplink lets a body compete with what stands for the library: it only looks whether there is
// room now.
func TestHTTPAndPeersShareTheUplink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLimiter(Limits{UploadRate: 10 << 20})
		end := time.Now().Add(10 * time.Second)
		var library, bodies int
		var wg sync.WaitGroup
		wg.Go(func() {
			for time.Now().Before(end) {
				r := l.Library().ReserveN(time.Now(), MaxTurn)
				if d := r.Delay(); d > 0 {
					r.Cancel()
					time.Sleep(d)
					continue
				}
				library += MaxTurn
			}
		})
		var mu sync.Mutex
		for range 8 {
			wg.Go(func() {
				for time.Now().Before(end) {
					l.WaitUp(nil, "", MaxTurn)
					mu.Lock()
					bodies += MaxTurn
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		all := float64(library + bodies)
		if all > 103<<20 || all < 98<<20 || float64(library) < all/4 || float64(bodies) < all/4 {
			t.Errorf("in 10 s at 10 MiB/s the library sent %d bytes and bodies %d, want 100 MiB in all and a fair share of each", library, bodies)
		}
	})
}

func TestBlobLimitersAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLimiter(Limits{BlobUploadRate: 1 << 20})
		for i := range 10_000 {
			l.WaitBlobUp(nil, digest.FromString(fmt.Sprint(i)), 1000)
			time.Sleep(time.Millisecond)
		}
		if n := len(l.now.Load().up.blobs); n > 256 {
			t.Errorf("%d limiters are kept", n)
		}
	})
}

// Blocks that are sent side by side go in step with the rate, a part of each in turn; who is gone waits no longer.
func TestBlocksGoInPartsInStepWithTheRate(t *testing.T) {
	const block, senders, rate = 128 << 10, 4, 1 << 20
	synctest.Test(t, func(t *testing.T) {
		l := NewLimiter(Limits{UploadRate: rate})
		began := time.Now()
		var wg sync.WaitGroup
		for range senders {
			wg.Go(func() {
				for left := block; left > 0; {
					n, ok := l.WaitPart(nil, left)
					if !ok || n <= 0 || n > 16<<10 {
						t.Errorf("a part of %d bytes, %v", n, ok)
						return
					}
					left -= n
				}
				// One after the other they would end after 125, 250, 375 and 500 ms.
				if took := time.Since(began); took < 300*time.Millisecond || took > 500*time.Millisecond {
					t.Errorf("a block was sent after %s", took)
				}
			})
		}
		wg.Wait()
		if took := time.Since(began); took < 450*time.Millisecond {
			t.Errorf("%d bytes went in %s", senders*block, took)
		}
		gone := make(chan struct{})
		close(gone)
		for range 3 { // more than the burst
			if _, ok := l.WaitPart(gone, block); !ok {
				return
			}
		}
		t.Error("parts for a peer that is gone wait for the rate")
	})
}

func TestBlocksGoWholeWithoutARate(t *testing.T) {
	l := NewLimiter(Limits{})
	if n, ok := l.WaitPart(nil, MaxTurn); n != MaxTurn || !ok {
		t.Errorf("a part is %d bytes, %v", n, ok)
	}
}

// A part that waits when the rate changes waits by the new one.
func TestPartsFollowAChangeOfTheRate(t *testing.T) {
	for _, c := range []struct {
		name string
		then Limits
		want time.Duration
	}{
		{"lifted", Limits{}, time.Second},
		// 60 parts of 16 KiB, of which two go at once.
		{"raised", Limits{UploadRate: 1 << 20}, time.Second + 58*time.Second/64},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := NewLimiter(Limits{UploadRate: Min})
				for range 3 { // what is ahead
					if _, ok := l.WaitPart(nil, 16<<10); !ok {
						t.Fatal("no part")
					}
				}
				began := time.Now()
				var wg sync.WaitGroup
				for range 60 {
					wg.Go(func() {
						if _, ok := l.WaitPart(nil, 16<<10); !ok {
							t.Error("no part")
						}
					})
				}
				time.Sleep(time.Second)
				l.set(c.then)
				wg.Wait()
				took := time.Since(began)
				if diff := (took - c.want).Abs(); diff > 200*time.Millisecond {
					t.Errorf("took %s, want about %s", took, c.want)
				}
			})
		})
	}
}

// TestEachBlobHasItsLimit: what the library sends of two blobs side by side goes twice as fast as of one.
func TestEachBlobHasItsLimit(t *testing.T) {
	const rate = 2 << 20
	for blobs, want := range map[int]time.Duration{1: 3750 * time.Millisecond, 2: 1750 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			l := NewLimiter(Limits{BlobUploadRate: rate})
			began := time.Now()
			var wg sync.WaitGroup
			for i := range 2 {
				wg.Go(func() {
					for range 4 << 20 / MaxTurn {
						l.WaitBlobUp(nil, digest.FromString(fmt.Sprint(i%blobs)), MaxTurn)
					}
				})
			}
			wg.Wait()
			if took := time.Since(began); (took - want).Abs() > 150*time.Millisecond {
				t.Errorf("8 MiB of %d blobs at 2 MiB/s each took %s, want %s", blobs, took, want)
			}
		})
	}
}

func TestBodiesKeepToTheLimits(t *testing.T) {
	b := make([]byte, 4<<20)
	d := digest.FromBytes(b)
	synctest.Test(t, func(t *testing.T) {
		l := NewLimiter(Limits{UploadRate: 4 << 20, DownloadRate: 4 << 20})
		for name, r := range map[string]io.Reader{
			"upload":   l.Upload(t.Context(), d, bytes.NewReader(b)),
			"download": l.Download(t.Context(), d, bytes.NewReader(b)),
		} {
			began := time.Now()
			got, err := io.ReadAll(r)
			if took := time.Since(began); err != nil || !bytes.Equal(got, b) || took < 700*time.Millisecond || took > time.Second {
				t.Errorf("%s: 4 MiB at 4 MiB/s took %s, error %v", name, took, err)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := io.ReadAll(l.Download(ctx, d, bytes.NewReader(b))); err == nil {
			t.Error("the body of a request that has ended was read to its end")
		}
		if err := l.Change(func(r *Limits) error { *r = Limits{}; return nil }); err != nil {
			t.Fatal(err)
		}
		body := bytes.NewReader(b)
		if got := l.Upload(t.Context(), d, body); got != io.ReadSeeker(body) {
			t.Error("without a limit the body is wrapped: sendfile is lost")
		}
	})
}
