package swarm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	pp "github.com/anacrolix/torrent/peer_protocol"
)

var (
	// errTorn: the library has written something else than whole messages.
	errTorn = errors.New("what is to be sent is no message of the peer protocol")
	// errGone: the connection was closed meanwhile.
	errGone = errors.New("peer is gone")
)

// keepAlive is after how long without anything else a keep-alive is sent. Peers wait for two minutes (BEP 3).
const keepAlive = 50 * time.Second

// blockHead is how many bytes of a Piece message come before the block: length, type, index, begin (BEP 3).
const blockHead = 4 + 1 + 4 + 4

// Write sends what the library wrote, once the handshake is over always whole messages. Blocks go in parts in step with
// the rate. Over TCP they have not been read (content.ReadAt): they go from the blob's file to the socket, which saves
// reading and copying them.
func (c *conn) Write(b []byte) (int, error) {
	if !c.framed {
		return c.Conn.Write(b)
	}
	now := time.Now()
	if len(b) == 4 && binary.BigEndian.Uint32(b) == 0 && now.Sub(c.said) < keepAlive {
		return len(b), nil // the library writes one each time that it wakes up
	}
	c.said = now
	sent := 0
	for at := 0; at < len(b); {
		if len(b)-at < 4 || len(b)-at-4 < int(binary.BigEndian.Uint32(b[at:])) {
			return sent, errTorn
		}
		end := at + 4 + int(binary.BigEndian.Uint32(b[at:]))
		if end-at > blockHead && pp.MessageType(b[at+4]) == pp.Piece {
			if err := c.writeBlock(b[sent:end], at-sent); err != nil {
				return sent, c.notSent(err)
			}
			sent = end
		}
		at = end
	}
	if sent == len(b) {
		return sent, nil
	}
	n, err := c.Conn.Write(b[sent:])
	return sent + n, err
}

// writeBlock sends b: messages, and from at on a Piece message.
func (c *conn) writeBlock(b []byte, at int) error {
	piece := b[at:]
	// What comes before the block waits for its turn with it: sent ahead, in segments of its own, it makes a swarm
	// slower.
	head, block := b[:at+blockHead], piece[blockHead:]
	off := int64(binary.BigEndian.Uint32(piece[5:]))*c.t.m.PieceLength() + int64(binary.BigEndian.Uint32(piece[9:]))
	for len(block) > 0 {
		n, ok := c.s.limiter.WaitPart(c.gone, len(block))
		if !ok {
			return errGone
		}
		if err := c.writePart(head, block[:n], off); err != nil {
			return err
		}
		head, block, off = nil, block[n:], off+int64(n)
	}
	return nil
}

// writePart sends head, which only the first part of a block has, and a part of a block, which is at off in the blob.
func (c *conn) writePart(head, part []byte, off int64) error {
	if c.raw == nil {
		if len(head) > 0 {
			if _, err := c.Conn.Write(head); err != nil {
				return err
			}
		}
		_, err := c.Conn.Write(part)
		return err
	}
	if len(head) > 0 {
		if err := sendMore(c.raw, head); err != nil {
			return err
		}
	}
	return sendOpen(c.raw, c.Conn, c.t.data.data, off, int64(len(part)))
}

// notSent returns the error of a block that was not sent whole, and logs and counts it where it is the disk's. The
// library tells nobody, and the disk's fault must not look like the peer's.
func (c *conn) notSent(err error) error {
	err = fmt.Errorf("send a block of %s to peer %s: %w", c.t.m.Digest, c.address.addr, err)
	if !ofPeer(err) && !errors.Is(err, os.ErrClosed) { // closed: the blob was evicted, or the swarm is
		c.s.m.unreadable.Inc()
		c.s.log.Warn("a block can't be sent", "digest", c.t.m.Digest, "error", err)
	}
	return err
}
