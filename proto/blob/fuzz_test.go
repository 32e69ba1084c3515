package blob

import (
	"bytes"
	"testing"
)

// FuzzBitmap has a bitmap agree with a list of booleans, whatever a peer or a disk says the pieces are.
func FuzzBitmap(f *testing.F) {
	f.Add(uint16(9), []byte{0xff, 0x80})
	f.Add(uint16(9), []byte{0xff, 0xc0})
	f.Fuzz(func(t *testing.T, pieces uint16, b []byte) {
		n := int(pieces)
		m, err := ParseBitmap(n, b)
		if err != nil {
			return
		}
		if len(b) != (n+7)/8 || m.Len() != n || !bytes.Equal(m.Bytes(), b) {
			t.Fatalf("%d pieces of %x are %d of %x", n, b, m.Len(), m.Bytes())
		}
		count, again := 0, NewBitmap(n)
		for i := -8; i < n+16; i++ {
			has := i >= 0 && i < n && b[i/8]>>(7-i%8)&1 == 1
			if m.Has(i) != has {
				t.Fatalf("%x: piece %d is %v", b, i, m.Has(i))
			}
			if has {
				count++
				again.Set(i)
			}
		}
		if m.Count() != count || m.Full() != (count == n) || !bytes.Equal(again.Bytes(), b) {
			t.Fatalf("%x: %d pieces, full %v, want %d", b, m.Count(), m.Full(), count)
		}
		for i := range n {
			m.Clear(i)
		}
		if m.Count() != 0 || again.Count() != count {
			t.Fatalf("%x: cleared, %d are left; the other has %d", b, m.Count(), again.Count())
		}
	})
}
