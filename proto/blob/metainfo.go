package blob

import (
	"bytes"
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"math/bits"
	"strconv"
	"sync"

	"github.com/opencontainers/go-digest"
)

// ErrMetainfoInvalid is a metainfo that is not the canonical encoding of a blob.
var ErrMetainfoInvalid = errors.New("metainfo invalid")

// Bounds of piece lengths, of blobs, and of the metainfo of one.
const (
	MinPieceLength = 128 << 10
	MaxPieceLength = 16 << 20
	MaxSize        = 16 << 40
	MaxMetainfo    = 64 << 20
	// fewer cost a swarm time: at 1,000 peers 25 pieces take 1.58x the time of one copy, 400 take 1.05x
	minPieces = 400
)

// PieceLength is a pure function of a blob's size: the largest power of two that gives at least 400 pieces, within
// [MinPieceLength, MaxPieceLength].
func PieceLength(size int64) int64 {
	want := size / minPieces
	if want <= MinPieceLength {
		return MinPieceLength
	}
	return min(int64(1)<<(bits.Len64(uint64(want))-1), MaxPieceLength)
}

// InfoHash names a swarm: SHA-1 of the canonical info dictionary (BEP 3).
type InfoHash [sha1.Size]byte

// String is the hexadecimal form.
func (h InfoHash) String() string { return hex.EncodeToString(h[:]) }

// Metainfo is what a peer needs to know to fetch and check a blob piece by piece. It is immutable and safe for
// concurrent use.
type Metainfo struct {
	Digest digest.Digest
	Size   int64 // bytes
	pieces []byte
	// provisional says that pieces are placeholders.
	provisional bool

	once sync.Once
	hash InfoHash
}

// Provisional returns the metainfo of a blob of size bytes none of whose piece hashes is known yet. Its pieces are
// placeholders that follow from the digest and from where the blob comes, so that all who read it from there have one
// info-hash, and can trade pieces while it still arrives. from is the host of a registry, empty for the cluster's own
// buckets: who reads a digest from another registry is never offered what this one sent. It is never stored and never
// sent.
func Provisional(d digest.Digest, size int64, from string) (*Metainfo, error) {
	if size < 0 || size > MaxSize {
		return nil, fmt.Errorf("%w: size %d is not in 0..%d", ErrMetainfoInvalid, size, int64(MaxSize))
	}
	if from != "" {
		from = "\x00" + from
	}
	pieces := make([]byte, 0, numPieces(size)*sha1.Size)
	for i := range numPieces(size) {
		h := sha1.Sum(fmt.Appendf(nil, "kraken provisional\x00%s\x00%d%s", d, i, from))
		pieces = append(pieces, h[:]...)
	}
	m, err := NewMetainfo(d, size, pieces)
	if err == nil {
		m.provisional = true
	}
	return m, err
}

// NewMetainfo takes the concatenated SHA-1 hashes of all pieces.
func NewMetainfo(d digest.Digest, size int64, pieces []byte) (*Metainfo, error) {
	if _, err := ParseDigest(d.String()); err != nil {
		return nil, err
	}
	if size < 0 || size > MaxSize {
		return nil, fmt.Errorf("%w: size %d is not in 0..%d", ErrMetainfoInvalid, size, int64(MaxSize))
	}
	if n := numPieces(size); int64(len(pieces)) != n*sha1.Size {
		return nil, fmt.Errorf("%w: %d bytes of piece hashes, a blob of %d bytes has %d pieces", ErrMetainfoInvalid, len(pieces), size, n)
	}
	return &Metainfo{Digest: d, Size: size, pieces: pieces}, nil
}

func numPieces(size int64) int64 {
	l := PieceLength(size)
	return (size + l - 1) / l
}

// PieceLength is the length of every piece but the last, in bytes.
func (m *Metainfo) PieceLength() int64 { return PieceLength(m.Size) }

// NumPieces is 0 for an empty blob.
func (m *Metainfo) NumPieces() int { return len(m.pieces) / sha1.Size }

// PieceSize is the length of piece i in bytes.
func (m *Metainfo) PieceSize(i int) int64 {
	l := m.PieceLength()
	return min(l, m.Size-int64(i)*l)
}

// IsProvisional reports whether the piece hashes are placeholders.
func (m *Metainfo) IsProvisional() bool { return m.provisional }

// PieceHash is the SHA-1 of piece i; of a provisional metainfo it is none that any piece has.
func (m *Metainfo) PieceHash(i int) (h [sha1.Size]byte) {
	copy(h[:], m.pieces[i*sha1.Size:])
	return h
}

// InfoBytes is the canonical info dictionary: length, name, piece length, pieces, private, and nothing else.
func (m *Metainfo) InfoBytes() []byte {
	h := m.Digest.Encoded()
	b := make([]byte, 0, len(m.pieces)+len(h)+128)
	b = append(b, "d6:lengthi"...)
	b = strconv.AppendInt(b, m.Size, 10)
	b = append(b, "e4:name"...)
	b = appendString(b, h)
	b = append(b, "12:piece lengthi"...)
	b = strconv.AppendInt(b, m.PieceLength(), 10)
	b = append(b, "e6:pieces"...)
	b = strconv.AppendInt(b, int64(len(m.pieces)), 10)
	b = append(b, ':')
	b = append(b, m.pieces...)
	return append(b, "7:privatei1ee"...)
}

func appendString(b []byte, s string) []byte {
	b = strconv.AppendInt(b, int64(len(s)), 10)
	b = append(b, ':')
	return append(b, s...)
}

// InfoHash is SHA-1 of InfoBytes.
func (m *Metainfo) InfoHash() InfoHash {
	m.once.Do(func() { m.hash = sha1.Sum(m.InfoBytes()) })
	return m.hash
}

// Marshal is the form on disk and between roles: a dictionary with the info dictionary alone.
func (m *Metainfo) Marshal() []byte {
	return append(append([]byte("d4:info"), m.InfoBytes()...), 'e')
}

// Torrent is a .torrent file (BEP 3) with an announce URL and web seeds (BEP 19 url-list), either may be empty.
func (m *Metainfo) Torrent(announce string, webSeeds []string) []byte {
	b := []byte{'d'}
	if announce != "" {
		b = appendString(append(b, "8:announce"...), announce)
	}
	b = append(append(b, "4:info"...), m.InfoBytes()...)
	if len(webSeeds) > 0 {
		b = append(b, "8:url-listl"...)
		for _, u := range webSeeds {
			b = appendString(b, u)
		}
		b = append(b, 'e')
	}
	return append(b, 'e')
}

// ParseMetainfo takes what Marshal gives, and nothing that differs from it by a byte.
func ParseMetainfo(b []byte) (*Metainfo, error) {
	if len(b) > MaxMetainfo {
		return nil, fmt.Errorf("%w: %d bytes, at most %d are allowed", ErrMetainfoInvalid, len(b), MaxMetainfo)
	}
	c := cursor{rest: b}
	c.skip("d4:infod6:length")
	size := c.integer()
	c.skip("4:name")
	name := c.bytes(128)
	c.skip("12:piece length")
	c.integer()
	c.skip("6:pieces")
	pieces := c.bytes(MaxMetainfo)
	if c.failed {
		return nil, fmt.Errorf("%w: not the canonical encoding", ErrMetainfoInvalid)
	}
	d, err := fromHex(string(name))
	if err != nil {
		return nil, fmt.Errorf("%w: name: %w", ErrMetainfoInvalid, err)
	}
	m, err := NewMetainfo(d, size, bytes.Clone(pieces))
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(m.Marshal(), b) {
		return nil, fmt.Errorf("%w: not the canonical encoding", ErrMetainfoInvalid)
	}
	return m, nil
}

// cursor reads bencoded values; after the first mistake it reads nothing more.
type cursor struct {
	rest   []byte
	failed bool
}

func (c *cursor) skip(s string) {
	rest, ok := bytes.CutPrefix(c.rest, []byte(s))
	if c.rest = rest; !ok {
		c.failed = true
	}
}

func (c *cursor) number(end byte) int64 {
	i := bytes.IndexByte(c.rest[:min(len(c.rest), 24)], end)
	if c.failed || i < 0 {
		c.failed = true
		return 0
	}
	n, err := strconv.ParseInt(string(c.rest[:i]), 10, 64)
	if err != nil || n < 0 {
		c.failed = true
	}
	c.rest = c.rest[i+1:]
	return n
}

func (c *cursor) integer() int64 {
	c.skip("i")
	return c.number('e')
}

func (c *cursor) bytes(limit int64) []byte {
	n := c.number(':')
	if c.failed || n > limit || n > int64(len(c.rest)) {
		c.failed = true
		return nil
	}
	b := c.rest[:n]
	c.rest = c.rest[n:]
	return b
}

// PieceHasher computes a metainfo in one pass over a blob whose size is known.
type PieceHasher struct {
	size, at int64
	h        hash.Hash
	pieces   []byte
}

// NewPieceHasher returns a hasher that wants exactly size bytes.
func NewPieceHasher(size int64) *PieceHasher { return &PieceHasher{size: size, h: sha1.New()} }

// Write takes the next bytes of the blob; more than its size is an error.
func (p *PieceHasher) Write(b []byte) (int, error) {
	if p.at+int64(len(b)) > p.size {
		return 0, fmt.Errorf("%w: more than %d bytes", ErrMetainfoInvalid, p.size)
	}
	l, n := PieceLength(p.size), len(b)
	for len(b) > 0 {
		k := min(l-p.at%l, int64(len(b)))
		p.h.Write(b[:k])
		b = b[k:]
		if p.at += k; p.at%l == 0 || p.at == p.size {
			p.pieces = p.h.Sum(p.pieces)
			p.h.Reset()
		}
	}
	return n, nil
}

// Pieces returns the concatenated hashes of the pieces that were written whole. They are the caller's to read, and stay
// as they are.
func (p *PieceHasher) Pieces() []byte { return p.pieces[:len(p.pieces):len(p.pieces)] }

// Sum is the metainfo of what was written, which must be all of it.
func (p *PieceHasher) Sum(d digest.Digest) (*Metainfo, error) {
	if p.at != p.size {
		return nil, fmt.Errorf("%w: %d of %d bytes were hashed", ErrMetainfoInvalid, p.at, p.size)
	}
	return NewMetainfo(d, p.size, bytes.Clone(p.pieces))
}
