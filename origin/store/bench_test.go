package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/opencontainers/go-digest"
)

// BenchmarkIngest takes blobs in: written, hashed twice (whole and pieces), synced, committed. Each is another one.
func BenchmarkIngest(b *testing.B) {
	for _, size := range []int{10 << 10, 1 << 20, 64 << 20} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			s, err := Open(Config{Dir: b.TempDir()})
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			content := noise(size, 1)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			var i uint64
			for b.Loop() {
				b.StopTimer()
				i++
				binary.BigEndian.PutUint64(content, i)
				d := digest.FromBytes(content)
				b.StartTimer()
				if _, err := s.Ingest(context.Background(), d, int64(size), bytes.NewReader(content), nil); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := s.Delete(d); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

// BenchmarkPartial fills a blob of 64 MiB piece by piece and commits it.
func BenchmarkPartial(b *testing.B) {
	s, err := Open(Config{Dir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	content := noise(64<<20, 1)
	m := metainfoOf(b, content)
	b.SetBytes(int64(len(content)))
	for b.Loop() {
		p, err := s.Partial(m)
		if err != nil {
			b.Fatal(err)
		}
		for i := range m.NumPieces() {
			off := int64(i) * m.PieceLength()
			if _, err := p.WriteAt(content[off:off+m.PieceSize(i)], off); err != nil {
				b.Fatal(err)
			}
			if err := p.MarkVerified(i); err != nil {
				b.Fatal(err)
			}
		}
		if _, err := p.Commit(context.Background()); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		p.Close()
		if err := s.Delete(m.Digest); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkOpen opens a blob of a store of 10,000 for reading.
func BenchmarkOpen(b *testing.B) {
	s, err := Open(Config{Dir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	d := digest.FromBytes(noise(1<<20, 1))
	if _, err := s.Ingest(context.Background(), d, 1<<20, bytes.NewReader(noise(1<<20, 1)), nil); err != nil {
		b.Fatal(err)
	}
	for i := range 10_000 {
		s.entries[digest.FromString(fmt.Sprint(i))] = &entry{}
	}
	b.ReportAllocs()
	for b.Loop() {
		r, err := s.Open(d)
		if err != nil {
			b.Fatal(err)
		}
		r.Close()
	}
}
