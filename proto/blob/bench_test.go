package blob

import (
	"crypto/sha1"
	"crypto/sha256"
	"hash"
	"math/rand/v2"
	"testing"

	"github.com/opencontainers/go-digest"
)

// BenchmarkHash is what verifying costs: SHA-1 for pieces, SHA-256 for the whole, and both in one pass as at a push.
func BenchmarkHash(b *testing.B) {
	const size, chunk = 64 << 20, 256 << 10
	content := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(content)
	run := func(name string, each func(write func(h interface{ Write([]byte) (int, error) }))) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(size)
			b.ReportAllocs()
			for b.Loop() {
				each(func(h interface{ Write([]byte) (int, error) }) {
					for off := 0; off < size; off += chunk {
						if _, err := h.Write(content[off : off+chunk]); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
		})
	}
	type writer = interface{ Write([]byte) (int, error) }
	plain := func(h func() hash.Hash) func(func(writer)) {
		return func(write func(writer)) { h := h(); write(h); h.Sum(nil) }
	}
	run("sha1", plain(sha1.New))
	run("sha256", plain(sha256.New))
	d := digest.FromBytes(content)
	run("pieces", func(write func(writer)) {
		h := NewPieceHasher(size)
		write(h)
		if _, err := h.Sum(d); err != nil {
			b.Fatal(err)
		}
	})
	run("pieces-and-sha256", func(write func(writer)) {
		h, whole := NewPieceHasher(size), sha256.New()
		write(both{h, whole})
		if _, err := h.Sum(d); err != nil {
			b.Fatal(err)
		}
	})
}

type both struct {
	a *PieceHasher
	b hash.Hash
}

func (w both) Write(b []byte) (int, error) {
	w.b.Write(b)
	return w.a.Write(b)
}

// BenchmarkMetainfo is writing and reading the metainfo of a blob of 64 MiB.
func BenchmarkMetainfo(b *testing.B) {
	h := NewPieceHasher(64 << 20)
	if _, err := h.Write(make([]byte, 64<<20)); err != nil {
		b.Fatal(err)
	}
	m, err := h.Sum(digest.FromString("x"))
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseMetainfo(m.Marshal()); err != nil {
			b.Fatal(err)
		}
	}
}
