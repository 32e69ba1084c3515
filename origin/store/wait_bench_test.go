package store

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// BenchmarkMany fills a store with blobs and says how long its start took, what reads and lookups waited for while a
// tenth of them was evicted, and what lookups waited for while partial blobs were opened. KRAKEN_BLOBS is their number,
// default 5000.
func BenchmarkMany(b *testing.B) {
	n := 5000
	if v := os.Getenv("KRAKEN_BLOBS"); v != "" {
		if _, err := fmt.Sscan(v, &n); err != nil {
			b.Fatal(err)
		}
	}
	dir := b.TempDir()
	s, err := Open(Config{Dir: dir, Volatile: true})
	if err != nil {
		b.Fatal(err)
	}
	content := noise(4000, 1)
	var ds []digest.Digest
	for i := range n {
		copy(content, fmt.Sprintf("%08d", i))
		d := digest.FromBytes(content)
		u, err := s.NewUpload(UploadOptions{Size: int64(len(content)), Transient: true, NoMetainfo: true})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := u.Write(context.Background(), 0, bytes.NewReader(content)); err != nil {
			b.Fatal(err)
		}
		if _, err := u.Commit(context.Background(), d, nil); err != nil {
			b.Fatal(err)
		}
		ds = append(ds, d)
	}
	used, _ := s.Usage()
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
	began := time.Now()
	s, err = Open(Config{Dir: dir, Capacity: used + used/100, Keep: Keep{HighWater: 0.991, LowWater: 0.89}})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	b.ReportMetric(float64(time.Since(began).Microseconds())/1e3, "ms-to-Open")
	<-s.Scanned()
	b.ReportMetric(float64(time.Since(began).Microseconds())/1e3, "ms-to-scanned")
	r, err := s.Open(ds[n-1])
	if err != nil {
		b.Fatal(err)
	}
	r.Close()
	measure := func(name string, load func()) {
		stop := make(chan struct{})
		var took []time.Duration
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				t := time.Now()
				if _, err := s.Stat(ds[n-1]); err != nil {
					b.Error(err)
					return
				}
				r, err := s.Open(ds[n-1])
				if err != nil {
					b.Error(err)
					return
				}
				r.Close()
				took = append(took, time.Since(t))
				time.Sleep(100 * time.Microsecond)
			}
		})
		began := time.Now()
		load()
		b.ReportMetric(float64(time.Since(began).Milliseconds()), name+"-ms")
		close(stop)
		wg.Wait()
		slices.Sort(took)
		b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), name+"-p99-µs")
		b.ReportMetric(float64(took[len(took)-1].Microseconds()), name+"-max-µs")
	}
	measure("evict", func() {
		big := noise(int(used/50), 2)
		if _, err := s.Ingest(context.Background(), digest.FromBytes(big), int64(len(big)), bytes.NewReader(big), nil); err != nil {
			b.Error(err)
		}
		settled(s)
	})
	measure("partials", func() {
		for i := range 100 {
			p, err := s.Partial(metainfoOf(b, noise(1000+i, 3)))
			if err != nil {
				b.Error(err)
				return
			}
			p.Close()
		}
	})
}
