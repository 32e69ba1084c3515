package bucket

import (
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/opencontainers/go-digest"
)

// ErrContent is a body that does not have the digest that it should have. Nothing of it is in the bucket.
var ErrContent = errors.New("content does not have its digest")

// Checked is the body of an object whose digest is known. It hashes what is read, and ends with ErrContent instead of
// io.EOF when that is other content: so a Put of it that returns nil has written the right bytes. A driver that keeps
// digests with its objects tells the digest in Object.
type Checked struct {
	r      io.ReadSeeker
	d      digest.Digest
	h      hash.Hash
	start  int64 // where the body begins in r
	pos    int64 // in r
	hashed int64 // up to which position of r h has read
}

// NewChecked returns the body of r, from where it stands to its end, which should be d.
func NewChecked(d digest.Digest, r io.ReadSeeker) (*Checked, error) {
	at, err := r.Seek(0, io.SeekCurrent)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", d, err)
	}
	return &Checked{r: r, d: d, h: d.Algorithm().Hash(), start: at, pos: at, hashed: at}, nil
}

// Digest is the digest that the body should have.
func (c *Checked) Digest() digest.Digest { return c.d }

// Seek implements io.Seeker. The body is read again from its beginning after a Seek to it.
func (c *Checked) Seek(off int64, whence int) (int64, error) {
	pos, err := c.r.Seek(off, whence)
	if err == nil {
		c.pos = pos
	}
	return pos, err
}

// Read implements io.Reader.
func (c *Checked) Read(p []byte) (int, error) {
	if c.pos == c.start && c.hashed != c.start {
		c.h.Reset()
		c.hashed = c.start
	}
	n, err := c.r.Read(p)
	if c.pos == c.hashed {
		c.h.Write(p[:n])
		c.hashed += int64(n)
	}
	c.pos += int64(n)
	if err == io.EOF {
		// Where some of it was passed over, it was not checked.
		if got := digest.NewDigest(c.d.Algorithm(), c.h); c.pos != c.hashed || got != c.d {
			return n, fmt.Errorf("%w: it is %s, not %s", ErrContent, got, c.d)
		}
	}
	return n, err
}
