package swarm

import (
	"fmt"
	"syscall"
	"testing"
	"time"
)

// cpu is what the process has used so far.
func cpu() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkFetch moves a blob from one seed to leechers on loopback, all in this process, and reports the CPU seconds of all of them
// for each GiB delivered. Committing (SHA-256 of the whole) is part of it, as it is of a pull.
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
