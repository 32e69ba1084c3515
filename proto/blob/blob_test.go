package blob

import (
	"bytes"
	"crypto/sha1"
	"errors"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

func TestOCIParseDigest(t *testing.T) {
	hex64, hex128 := strings.Repeat("0a", 32), strings.Repeat("0b", 64)
	for s, ok := range map[string]bool{
		"sha256:" + hex64: true, "sha512:" + hex128: true,
		"": false, "sha256:": false, "sha256:" + hex64[:63]: false, "sha256:" + strings.ToUpper(hex64): false,
		"sha384:" + strings.Repeat("0", 96): false, "md5:d41d8cd98f00b204e9800998ecf8427e": false,
		"sha256:../../../etc/passwd" + hex64[:45]: false, hex64: false, "sha256:" + hex64 + "0": false,
	} {
		d, err := ParseDigest(s)
		if ok != (err == nil) || (ok && d.String() != s) || (!ok && !errors.Is(err, ErrDigestInvalid)) {
			t.Errorf("ParseDigest(%q) = %q, %v", s, d, err)
		}
	}
}

func TestPieceLength(t *testing.T) {
	for size, want := range map[int64]int64{
		0: 128 << 10, 1: 128 << 10, 64 << 20: 128 << 10, 256 << 20: 512 << 10, 1 << 30: 2 << 20, 16 << 30: 16 << 20, 1 << 40: 16 << 20,
	} {
		if got := PieceLength(size); got != want {
			t.Errorf("PieceLength(%d) = %d, want %d", size, got, want)
		}
	}
}

func metainfoOf(t testing.TB, b []byte) *Metainfo {
	t.Helper()
	h := NewPieceHasher(int64(len(b)))
	for part := b; len(part) > 0; { // uneven writes
		n := min(len(part), 100_001)
		if _, err := h.Write(part[:n]); err != nil {
			t.Fatal(err)
		}
		part = part[n:]
	}
	m, err := h.Sum(digest.FromBytes(b))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// TestGoldenInfo pins the bytes: another info-hash for the same blob would split every swarm.
func TestGoldenInfo(t *testing.T) {
	m := metainfoOf(t, bytes.Repeat([]byte("kraken\n"), 40_000)) // 280,000 bytes, three pieces
	if got, want := m.NumPieces(), 3; got != want {
		t.Fatalf("%d pieces, want %d", got, want)
	}
	prefix := "d6:lengthi280000e4:name64:" + m.Digest.Encoded() + "12:piece lengthi131072e6:pieces60:"
	if got := m.InfoBytes(); !bytes.HasPrefix(got, []byte(prefix)) || !bytes.HasSuffix(got, []byte("7:privatei1ee")) {
		t.Errorf("info dictionary %q", got)
	}
	if got, want := m.InfoHash().String(), "e541a9fe787746bc4dbde9e93ac26849b1403734"; got != want {
		t.Errorf("info-hash %s, want %s", got, want)
	}
	if m.PieceSize(2) != 280000-2*131072 {
		t.Errorf("last piece has %d bytes", m.PieceSize(2))
	}
}

func TestMetainfoRoundTrip(t *testing.T) {
	for _, n := range []int{0, 1, 131072, 131073, 1 << 20} {
		b := bytes.Repeat([]byte{7}, n)
		m := metainfoOf(t, b)
		got, err := ParseMetainfo(m.Marshal())
		if err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		if got.Digest != m.Digest || got.Size != m.Size || got.InfoHash() != m.InfoHash() {
			t.Errorf("%d bytes: %+v differs from %+v", n, got, m)
		}
		if n > 0 && got.PieceHash(0) != sha1.Sum(b[:got.PieceSize(0)]) {
			t.Errorf("%d bytes: wrong hash of piece 0", n)
		}
	}
}

func TestMetainfoRefusesWhatIsNotCanonical(t *testing.T) {
	good := string(metainfoOf(t, make([]byte, 300_000)).Marshal())
	for name, bad := range map[string]string{
		"empty": "", "trailing": good + "x", "cut": good[:len(good)-1],
		"other size":         strings.Replace(good, "i300000e", "i300001e", 1),
		"leading zero":       strings.Replace(good, "i300000e", "i0300000e", 1),
		"other piece length": strings.Replace(good, "i131072e", "i262144e", 1),
		"not private":        strings.Replace(good, "7:privatei1e", "7:privatei0e", 1),
		"huge string":        "d4:infod6:lengthi1e4:name9999999999:",
	} {
		if bad == good {
			t.Fatalf("%s: nothing was changed", name)
		}
		if m, err := ParseMetainfo([]byte(bad)); err == nil && m.Size == 300_000 {
			t.Errorf("%s: accepted", name)
		} else if err != nil && !errors.Is(err, ErrMetainfoInvalid) {
			t.Errorf("%s: %v is no ErrMetainfoInvalid", name, err)
		}
	}
}

func TestPieceHasherWantsAllBytes(t *testing.T) {
	h := NewPieceHasher(10)
	if _, err := h.Write(make([]byte, 11)); err == nil {
		t.Error("took more bytes than the blob has")
	}
	if _, err := h.Sum(digest.FromString("")); err == nil {
		t.Error("summed before all bytes came")
	}
}

func TestBitmap(t *testing.T) {
	m := NewBitmap(11)
	for _, i := range []int{0, 7, 8, 10} {
		m.Set(i)
	}
	if got, want := m.Bytes(), []byte{0x81, 0xa0}; !bytes.Equal(got, want) {
		t.Errorf("bits %x, want %x", got, want)
	}
	c := m.Clone()
	c.Clear(0)
	if !m.Has(0) || c.Has(0) || m.Count() != 4 || m.Has(11) || m.Has(-1) || m.Full() {
		t.Error("bitmap or its clone is wrong")
	}
	if _, err := ParseBitmap(11, []byte{0, 0x10}); err == nil {
		t.Error("took bits beyond the end")
	}
}

func FuzzParseDigest(f *testing.F) {
	f.Add("sha256:" + strings.Repeat("0", 64))
	f.Fuzz(func(t *testing.T, s string) {
		if d, err := ParseDigest(s); err == nil && (d.String() != s || strings.ContainsAny(d.Encoded(), "/.\x00")) {
			t.Errorf("ParseDigest(%q) = %q", s, d)
		}
	})
}

func FuzzParseMetainfo(f *testing.F) {
	f.Add(metainfoOf(f, make([]byte, 300_000)).Marshal())
	f.Add([]byte("d4:infod6:lengthi0e4:name"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := ParseMetainfo(b); err == nil && !bytes.Equal(m.Marshal(), b) {
			t.Error("parsed metainfo marshals to other bytes")
		}
	})
}
