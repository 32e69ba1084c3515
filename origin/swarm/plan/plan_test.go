package plan

import (
	"crypto/sha1"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
)

const stall = 2 * time.Second

// memory is the Pieces of a test.
type memory struct{ set blob.Bitmap }

func (p *memory) Has(i int) bool      { return p.set.Has(i) }
func (p *memory) Bitmap() blob.Bitmap { return p.set.Clone() }

// blobOf returns the metainfo of a blob of n bytes, and what a node has that has nothing of it.
func blobOf(t *testing.T, n int64) (*blob.Metainfo, *memory) {
	t.Helper()
	count := (n + blob.PieceLength(n) - 1) / blob.PieceLength(n)
	m, err := blob.NewMetainfo(digest.FromString("a blob"), n, make([]byte, count*sha1.Size))
	if err != nil {
		t.Fatal(err)
	}
	return m, &memory{blob.NewBitmap(m.NumPieces())}
}

// pieces returns the numbers from first up to end.
func pieces(first, end int) (out []int) {
	for i := first; i < end; i++ {
		out = append(out, i)
	}
	return out
}

// in counts the numbers of all that are from first up to end.
func in(all []int, first, end int) (n int) {
	for _, i := range all {
		if i >= first && i < end {
			n++
		}
	}
	return n
}
