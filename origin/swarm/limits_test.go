package swarm

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/config"
)

func TestUploadRateIsKept(t *testing.T) {
	b := randomBytes(23, 8<<20)
	seed := newNode(t, func(c *Config) { c.UploadRate = 4 << 20 })
	m := seed.seed(b)
	began := time.Now()
	leech := newNode(t, nil)
	leech.fetch(m, nil, seed.peer()).finish()
	// The burst goes at once, the rest takes 1.9 s.
	if took := time.Since(began); took < 1500*time.Millisecond {
		t.Errorf("8 MiB at 4 MiB/s took %s", took)
	}
}

func TestDownloadRateIsKept(t *testing.T) {
	b := randomBytes(24, 4<<20)
	seed := newNode(t, nil)
	m := seed.seed(b)
	began := time.Now()
	leech := newNode(t, func(c *Config) { c.DownloadRate = 4 << 20 })
	leech.fetch(m, nil, seed.peer()).finish()
	if took := time.Since(began); took < 800*time.Millisecond {
		t.Errorf("4 MiB at 4 MiB/s took %s", took)
	}
}

// TestRateOfEachBlob fetches two blobs side by side: together they may be twice as fast as each alone.
func TestRateOfEachBlob(t *testing.T) {
	for _, c := range []struct {
		name        string
		seed, leech Rates
	}{
		{"up", Rates{BlobUploadRate: 2 << 20}, Rates{}},
		{"down", Rates{}, Rates{BlobDownloadRate: 2 << 20}},
	} {
		t.Run(c.name, func(t *testing.T) {
			seed := newNode(t, func(k *Config) { k.Rates = c.seed })
			leech := newNode(t, func(k *Config) { k.Rates = c.leech })
			began := time.Now()
			var ds []*download
			for i := range uint64(2) {
				ds = append(ds, leech.fetch(seed.seed(randomBytes(30+i, 4<<20)), nil, seed.peer()))
			}
			for _, d := range ds {
				d.finish()
			}
			// 2 s less the burst; 4 s if both shared one limit.
			if took := time.Since(began); took < 1600*time.Millisecond || took > 3400*time.Millisecond {
				t.Errorf("two blobs of 4 MiB at 2 MiB/s each took %s", took)
			}
		})
	}
}

// TestRateChangesForWhatIsUnderWay raises a rate in the middle of a download that would take half a minute.
func TestRateChangesForWhatIsUnderWay(t *testing.T) {
	b := randomBytes(25, 8<<20)
	seed := newNode(t, func(c *Config) { c.UploadRate = 256 << 10 })
	leech := newNode(t, nil)
	began := time.Now()
	d := leech.fetch(seed.seed(b), nil, seed.peer())
	eventually(t, "the first piece", func() bool { return d.part.Bitmap().Count() > 0 })
	if err := seed.SetRates(Rates{}); err != nil {
		t.Fatal(err)
	}
	d.finish()
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("took %s although the limit was lifted", took)
	}
	leech.has(b)
}

func TestDropEndsAWaitForTheRate(t *testing.T) {
	seed := newNode(t, func(c *Config) { c.UploadRate = minRate })
	m := seed.seed(randomBytes(26, 4<<20))
	leech := newNode(t, nil)
	d := leech.fetch(m, nil, seed.peer())
	eventually(t, "the first piece", func() bool { return d.part.Bitmap().Count() > 0 })
	began := time.Now()
	seed.Forget(m.Digest)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("forgetting a blob that waits for its turn took %s", took)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if err := d.part.Close(); err != nil {
		t.Error(err)
	}
}

// TestWaitingForTurns runs in a bubble, so the times are exact.
func TestWaitingForTurns(t *testing.T) {
	const rate = 10 << 20 // bursts are 1 MiB
	for _, c := range []struct {
		name  string
		rates Rates
		up    bool
		blobs []string // one sender each, of 10 MiB
		want  time.Duration
	}{
		{"unlimited", Rates{}, true, []string{"a", "b"}, 0},
		{"one", Rates{UploadRate: rate}, true, []string{"a"}, 900 * time.Millisecond},
		{"four share", Rates{UploadRate: rate}, true, []string{"a", "a", "b", "c"}, 3900 * time.Millisecond},
		{"each blob", Rates{BlobUploadRate: rate}, true, []string{"a", "b", "c"}, 900 * time.Millisecond},
		{"of one blob share", Rates{BlobUploadRate: rate}, true, []string{"a", "a"}, 1900 * time.Millisecond},
		{"both limits", Rates{UploadRate: 2 * rate, BlobUploadRate: rate}, true, []string{"a", "b", "c", "d"}, 1950 * time.Millisecond},
		{"the other direction", Rates{UploadRate: rate}, false, []string{"a"}, 0},
		{"down", Rates{DownloadRate: rate}, false, []string{"a", "b"}, 1900 * time.Millisecond},
		{"burst is bounded", Rates{UploadRate: 100 * rate}, true, []string{"a"}, 9 * time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var l limits
				l.init(c.rates)
				wait := l.download
				if c.up {
					wait = l.upload
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
		var l limits
		l.init(Rates{UploadRate: minRate})
		gone := make(chan struct{})
		left := make(chan bool)
		go func() { left <- l.upload(gone, "", 10<<20) }()
		synctest.Wait()
		close(gone)
		if <-left {
			t.Error("who has gone got all its turns")
		}
		began := time.Now()
		go func() { left <- l.upload(nil, "", 10<<20) }()
		time.Sleep(time.Second)
		l.set(Rates{})
		if !<-left || time.Since(began) > time.Second {
			t.Error("the lifted limit still holds")
		}
	})
}

// TestHTTPAndPeersShareTheUplink lets a body compete with what stands for the library: it only looks whether there is
// room now.
func TestHTTPAndPeersShareTheUplink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l limits
		l.init(Rates{UploadRate: 10 << 20})
		end := time.Now().Add(10 * time.Second)
		var library, bodies int
		var wg sync.WaitGroup
		wg.Go(func() {
			for time.Now().Before(end) {
				r := l.up.ReserveN(time.Now(), maxBlock)
				if d := r.Delay(); d > 0 {
					r.Cancel()
					time.Sleep(d)
					continue
				}
				library += maxBlock
			}
		})
		var mu sync.Mutex
		for range 8 {
			wg.Go(func() {
				for time.Now().Before(end) {
					l.upload(nil, "", maxBlock)
					mu.Lock()
					bodies += maxBlock
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
		var l limits
		l.init(Rates{BlobUploadRate: 1 << 20})
		for i := range 10_000 {
			l.uploadOf(nil, digest.FromString(fmt.Sprint(i)), 1000)
			time.Sleep(time.Millisecond)
		}
		if n := len(l.now.Load().up.blobs); n > 256 {
			t.Errorf("%d limiters are kept", n)
		}
	})
}

func TestBodiesKeepToTheRates(t *testing.T) {
	n := newNode(t, func(c *Config) { c.UploadRate, c.DownloadRate = 4<<20, 4<<20 })
	b := randomBytes(27, 4<<20)
	d := digest.FromBytes(b)
	for name, r := range map[string]io.Reader{
		"upload":   n.LimitUpload(t.Context(), d, bytes.NewReader(b)),
		"download": n.LimitDownload(t.Context(), d, bytes.NewReader(b)),
	} {
		began := time.Now()
		got, err := io.ReadAll(r)
		if took := time.Since(began); err != nil || !bytes.Equal(got, b) || took < 700*time.Millisecond {
			t.Errorf("%s: 4 MiB at 4 MiB/s took %s, error %v", name, took, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := io.ReadAll(n.LimitDownload(ctx, d, bytes.NewReader(b))); err == nil {
		t.Error("the body of a request that has ended was read to its end")
	}
	if err := n.SetRates(Rates{}); err != nil {
		t.Fatal(err)
	}
	body := bytes.NewReader(b)
	if got := n.LimitUpload(t.Context(), d, body); got != io.ReadSeeker(body) {
		t.Error("without a limit the body is wrapped: sendfile is lost")
	}
}

func TestOperatorsChangeRates(t *testing.T) {
	n := newNode(t, func(c *Config) { c.BlobUploadRate = 5 << 20 })
	m := http.NewServeMux()
	n.ControlRoutes(m)
	for _, c := range []struct {
		body string
		code int
		want Rates
	}{
		{`{"upload_rate": "25Mbit/s"}`, 200, Rates{UploadRate: 3_125_000, BlobUploadRate: 5 << 20}},
		{`{"download_rate": "10MiB/s", "blob_upload_rate": "0"}`, 200, Rates{UploadRate: 3_125_000, DownloadRate: 10 << 20}},
		{`{"upload": "1"}`, 400, Rates{UploadRate: 3_125_000, DownloadRate: 10 << 20}},
		{`{"upload_rate": "1kbit/s"}`, 400, Rates{UploadRate: 3_125_000, DownloadRate: 10 << 20}},
		{`{"upload_rate": "fast"}`, 400, Rates{UploadRate: 3_125_000, DownloadRate: 10 << 20}},
		{``, 400, Rates{UploadRate: 3_125_000, DownloadRate: 10 << 20}},
		{`{"upload_rate": "0"} {"download_rate": "0"}`, 400, Rates{UploadRate: 3_125_000, DownloadRate: 10 << 20}},
		{`{"upload_rate": 5000000}`, 400, Rates{UploadRate: 3_125_000, DownloadRate: 10 << 20}},
	} {
		w := httptest.NewRecorder()
		m.ServeHTTP(w, httptest.NewRequest("PUT", "/limits", strings.NewReader(c.body)))
		if w.Code != c.code || n.Rates() != c.want {
			t.Errorf("%s: %d %s, rates %+v, want %+v", c.body, w.Code, w.Body, n.Rates(), c.want)
		}
	}
	for body, want := range map[string]string{
		`{"upload_rate": 5000000}`: `upload_rate is a number, want a text like "25Mbit/s"`,
		`{} {}`:                    "want one JSON object",
	} {
		w := httptest.NewRecorder()
		m.ServeHTTP(w, httptest.NewRequest("PUT", "/limits", strings.NewReader(body)))
		if !strings.Contains(w.Body.String(), want) {
			t.Errorf("%s: %q, want it to say %q", body, w.Body, want)
		}
	}
	// What GET answers can be PUT back.
	w := httptest.NewRecorder()
	m.ServeHTTP(w, httptest.NewRequest("GET", "/limits", nil))
	if err := n.SetRates(Rates{}); err != nil {
		t.Fatal(err)
	}
	m.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("PUT", "/limits", w.Body))
	if want := (Rates{UploadRate: 3_125_000, DownloadRate: 10 << 20}); n.Rates() != want {
		t.Errorf("%+v came back, want %+v", n.Rates(), want)
	}
	if err := n.SetRates(Rates{DownloadRate: config.Rate(-1)}); err == nil {
		t.Error("a negative rate was taken")
	}
}

// Blocks that are sent side by side go in step with the rate, a part of each in turn; who is gone waits no longer.
func TestBlocksGoInPartsInStepWithTheRate(t *testing.T) {
	const block, senders, rate = 128 << 10, 4, 1 << 20
	synctest.Test(t, func(t *testing.T) {
		var l limits
		l.init(Rates{UploadRate: rate})
		began := time.Now()
		var wg sync.WaitGroup
		for range senders {
			wg.Go(func() {
				for left := block; left > 0; {
					n, ok := l.part(nil, left)
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
			if _, ok := l.part(gone, block); !ok {
				return
			}
		}
		t.Error("parts for a peer that is gone wait for the rate")
	})
}

func TestBlocksGoWholeWithoutARate(t *testing.T) {
	var l limits
	l.init(Rates{})
	if n, ok := l.part(nil, maxBlock); n != maxBlock || !ok {
		t.Errorf("a part is %d bytes, %v", n, ok)
	}
}

// A part that waits when the rate changes waits by the new one.
func TestPartsFollowAChangeOfTheRate(t *testing.T) {
	for _, c := range []struct {
		name string
		then Rates
		want time.Duration
	}{
		{"lifted", Rates{}, time.Second},
		// 60 parts of 16 KiB, of which two go at once.
		{"raised", Rates{UploadRate: 1 << 20}, time.Second + 58*time.Second/64},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var l limits
				l.init(Rates{UploadRate: minRate})
				for range 3 { // what is ahead
					if _, ok := l.part(nil, 16<<10); !ok {
						t.Fatal("no part")
					}
				}
				began := time.Now()
				var wg sync.WaitGroup
				for range 60 {
					wg.Go(func() {
						if _, ok := l.part(nil, 16<<10); !ok {
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
