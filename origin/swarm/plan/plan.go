// Package plan decides what a fetch of one blob asks of whom: which pieces of peers and with what priority, which of a
// Source, how much at once, and who is to blame for a piece that does not pass. It knows no sockets, no BitTorrent
// library and no HTTP; package swarm tells it what happens on the wire and does what it answers. Time is the clock's,
// so its tests run in virtual time.
package plan

import (
	"time"

	"kraken/proto/blob"
)

const (
	// MaxBlock is the longest block, in bytes, that nodes ask each other for, and that is served to anyone. While a
	// piece is one block, it comes from one peer alone, so that a wrong one tells who lied, and it is hashed from
	// memory.
	MaxBlock = 256 << 10
	// MaxInFlight is how many bytes are asked of one peer ahead at most, and askAhead for how long at the rate at which
	// it delivers. What lies in a queue for longer is stolen for another peer, leased as overdue, and comes twice.
	MaxInFlight = 4 << 20
	askAhead    = 500 * time.Millisecond
)

// BlockSize returns how many bytes are asked of a peer at once, for a blob of this piece length.
func BlockSize(pieceLength int64) int64 { return min(pieceLength, MaxBlock) }

// Pieces says which pieces of a blob are here and verified; a store.Partial is one. Both methods are safe for
// concurrent use and call nothing that waits for a plan's lock.
type Pieces interface {
	Has(i int) bool
	Bitmap() blob.Bitmap
}

// Conn is the connection with a peer. The wire acts on verdicts with it; this package calls neither method.
type Conn interface {
	// Ban keeps the peer out and closes all its connections.
	Ban(reason string)
	Close() error
}

// Peer is what a Board knows of a peer that it is connected with. ID and Conn are set before the Board sees it and do
// not change; the rest is under the Board's lock.
type Peer struct {
	ID   [20]byte
	Conn Conn

	proven   bool // a piece with its help has passed
	excused  bool // is not held any more
	unproven int  // blocks that it sent
	speed    speed
	merit    int // blocks that it sent of pieces that have passed
}

// speed measures bytes a second, over spans of some hundred milliseconds.
type speed struct {
	since time.Time
	n     int64
	rate  float64
}

// span is what a speed is measured over.
const span = 250 * time.Millisecond

func (s *speed) add(n int64, now time.Time) {
	if s.since.IsZero() {
		s.since = now
	}
	s.n += n
	if d := now.Sub(s.since); d >= span {
		s.rate = (s.rate + float64(s.n)/d.Seconds()) / 2
		s.since, s.n = now, 0
	}
}

// in returns how many bytes come in d.
func (s *speed) in(d time.Duration) int64 { return int64(s.rate * d.Seconds()) }
