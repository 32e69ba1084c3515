package blob

import (
	"bytes"
	"fmt"
	"math/bits"
)

// Bitmap says which pieces are there, in BEP 3's bit order: piece 0 is the high bit of the first byte. It is a value
// like a slice: copies share the bits, Clone does not. Not safe for concurrent use.
type Bitmap struct {
	n int
	b []byte
}

// NewBitmap has n pieces, none of them set.
func NewBitmap(n int) Bitmap { return Bitmap{n, make([]byte, (n+7)/8)} }

// ParseBitmap takes the bytes of a bitmap of n pieces. Spare bits must be zero.
func ParseBitmap(n int, b []byte) (Bitmap, error) {
	if len(b) != (n+7)/8 {
		return Bitmap{}, fmt.Errorf("bitmap of %d pieces has %d bytes, not %d", n, (n+7)/8, len(b))
	}
	if n%8 != 0 && b[len(b)-1]<<(n%8) != 0 {
		return Bitmap{}, fmt.Errorf("bitmap of %d pieces has bits beyond its end", n)
	}
	return Bitmap{n, bytes.Clone(b)}, nil
}

// Len is the number of pieces.
func (m Bitmap) Len() int { return m.n }

// Has says whether piece i is set; false outside the bitmap.
func (m Bitmap) Has(i int) bool { return i >= 0 && i < m.n && m.b[i/8]&(0x80>>(i%8)) != 0 }

// Set sets piece i.
func (m Bitmap) Set(i int) { m.b[i/8] |= 0x80 >> (i % 8) }

// Clear clears piece i.
func (m Bitmap) Clear(i int) { m.b[i/8] &^= 0x80 >> (i % 8) }

// Count is the number of set pieces.
func (m Bitmap) Count() int {
	n := 0
	for _, b := range m.b {
		n += bits.OnesCount8(b)
	}
	return n
}

// Full says that all pieces are set.
func (m Bitmap) Full() bool { return m.Count() == m.n }

// Bytes are the bits; the caller must not change them.
func (m Bitmap) Bytes() []byte { return m.b }

// Clone is a copy that shares nothing.
func (m Bitmap) Clone() Bitmap { return Bitmap{m.n, bytes.Clone(m.b)} }
