package swarm

import (
	"encoding/binary"
	"errors"
	"fmt"

	pp "github.com/anacrolix/torrent/peer_protocol"
)

// errTorn: the library has written something else than whole messages.
var errTorn = errors.New("what is to be sent is no message of the peer protocol")

// blockHead is how many bytes of a Piece message come before the block: length, type, index, begin (BEP 3).
const blockHead = 4 + 1 + 4 + 4

// Write sends what the library wrote, once the handshake is over always whole messages. Blocks go in parts in step with the rate. Over TCP
// they have not been read (content.ReadAt): they go from the blob's file to the socket, which saves reading and copying them.
func (c *conn) Write(b []byte) (int, error) {
	if !c.framed {
		return c.Conn.Write(b)
	}
	sent := 0
	for at := 0; at < len(b); {
		if len(b)-at < 4 || len(b)-at-4 < int(binary.BigEndian.Uint32(b[at:])) {
			return sent, errTorn
		}
		end := at + 4 + int(binary.BigEndian.Uint32(b[at:]))
		if end-at > blockHead && pp.MessageType(b[at+4]) == pp.Piece {
			if err := c.writeBlock(b[sent:at+blockHead], b[at:end]); err != nil {
				return sent, fmt.Errorf("send a block of %s to peer %s: %w", c.t.m.Digest, c.address.addr, err)
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

// writeBlock sends what comes before the block of a Piece message, which is the end of before, and the block.
func (c *conn) writeBlock(before, piece []byte) error {
	var err error
	if c.raw != nil {
		err = sendMore(c.raw, before)
	} else {
		_, err = c.Conn.Write(before)
	}
	off := int64(binary.BigEndian.Uint32(piece[5:]))*c.t.m.PieceLength() + int64(binary.BigEndian.Uint32(piece[9:]))
	for block := piece[blockHead:]; len(block) > 0 && err == nil; {
		n, ok := c.s.limits.part(c.gone, len(block))
		switch {
		case !ok:
			return errGone
		case c.raw != nil:
			err = c.t.data.send(c.raw, off, int64(n))
		default:
			_, err = c.Conn.Write(block[:n])
		}
		block, off = block[n:], off+int64(n)
	}
	return err
}

// errGone: the connection was closed meanwhile.
var errGone = errors.New("peer is gone")
