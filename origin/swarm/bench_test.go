package swarm

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"kraken/proto/blob"
)

// cpu is what the process has used so far.
func cpu() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkFetch moves a blob from one seed to leechers on loopback, all in this process, and reports the CPU seconds
// of all of them for each GiB delivered. Committing (SHA-256 of the whole) is part of it, as it is of a pull.
func BenchmarkFetch(b *testing.B) {
	for _, c := range []struct{ mib, leechers int }{{128, 1}, {512, 1}, {128, 4}} {
		b.Run(fmt.Sprintf("%dMiB-to-%d", c.mib, c.leechers), func(b *testing.B) {
			content := randomBytes(90, c.mib<<20)
			var used time.Duration
			for b.Loop() {
				seed := newNode(b, nil)
				m := seed.seed(content)
				before := cpu()
				var nodes []*node
				peers := []Peer{seed.peer()}
				for range c.leechers {
					n := newNode(b, nil)
					nodes, peers = append(nodes, n), append(peers, n.peer())
				}
				var downloads []*download
				for _, n := range nodes {
					downloads = append(downloads, n.fetch(m, nil, peers...))
				}
				for _, d := range downloads {
					d.finish()
				}
				used += cpu() - before
			}
			gib := float64(c.mib) / 1024 * float64(c.leechers) * float64(b.N)
			b.SetBytes(int64(c.mib) << 20 * int64(c.leechers))
			b.ReportMetric(used.Seconds()/gib, "cpu-s/GiB")
		})
	}
}

// slowSource sends no more than a rate in all.
type slowSource struct {
	*leaseServer
	l *rate.Limiter
}

func (s slowSource) ReadRange(ctx context.Context, m *blob.Metainfo, off, n int64) (io.ReadCloser, error) {
	r, err := s.leaseServer.ReadRange(ctx, m, off, n)
	return slowBody{r, ctx, s.l}, err
}

type slowBody struct {
	io.ReadCloser
	ctx context.Context
	l   *rate.Limiter
}

func (s slowBody) Read(b []byte) (int, error) {
	n, err := s.ReadCloser.Read(b[:min(len(b), 16<<10)])
	if werr := s.l.WaitN(s.ctx, n); werr != nil {
		return n, werr
	}
	return n, err
}

// BenchmarkFlashCrowd lets agents fetch a blob at the same time from one origin; every uplink has 25 Mbit/s. It reports
// the time of the median and of the last agent as a ratio to the lower bound max(F/u, N*F/(N+1)u), and how many copies
// the origin sent.
func BenchmarkFlashCrowd(b *testing.B) {
	const uplink, size = 25_000_000 / 8, 32 << 20
	for _, agents := range []int{1, 4, 8} {
		b.Run(fmt.Sprint(agents), func(b *testing.B) {
			content := randomBytes(91, size)
			m := metainfoOf(b, content)
			var median, last, copies float64
			for b.Loop() {
				origin := newLeaseServer(content)
				origin.again = time.Second
				src := slowSource{origin, rate.NewLimiter(uplink, 64<<10)}
				var nodes []*node
				var peers []Peer
				for range agents {
					n := newNode(b, func(c *Config) { c.UploadRate = uplink })
					nodes, peers = append(nodes, n), append(peers, n.peer())
				}
				began := time.Now()
				took := make([]time.Duration, agents)
				var wg sync.WaitGroup
				for i, n := range nodes {
					d := n.fetch(m, []Source{src}, peers...)
					wg.Go(func() { // a reader, with a window before it
						for k := range m.NumPieces() {
							if k%16 == 0 {
								d.SetWindow(1, int64(k)*m.PieceLength(), 8<<20)
							}
							if d.part.Wait(context.Background(), k) != nil {
								return
							}
						}
					})
					wg.Go(func() {
						<-d.Done()
						took[i] = time.Since(began)
						d.part.Commit(context.Background())
						d.Close()
						d.part.Close()
					})
				}
				wg.Wait()
				slices.Sort(took)
				bound := max(1, float64(agents)/float64(agents+1)) * size / uplink
				median += took[agents/2].Seconds() / bound
				last += took[agents-1].Seconds() / bound
				copies += float64(origin.bytesSent()) / size
			}
			b.ReportMetric(median/float64(b.N), "median/bound")
			b.ReportMetric(last/float64(b.N), "last/bound")
			b.ReportMetric(copies/float64(b.N), "origin-copies")
		})
	}
}
