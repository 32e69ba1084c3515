package swarm

import (
	"bufio"
	"bytes"
	"testing"
	"time"

	pp "github.com/anacrolix/torrent/peer_protocol"

	"kraken/origin/swarm/plan"
	"kraken/proto/blob"
)

// FuzzJudge feeds the guard what a peer may send after its handshake. What passes is within the bounds of the blob, and
// a field comes at most once.
func FuzzJudge(f *testing.F) {
	for _, m := range []pp.Message{
		{Type: pp.HaveAll}, {Type: pp.HaveNone}, {Type: pp.Have, Index: 3}, {Type: pp.Bitfield, Bitfield: make([]bool, 8)},
		{Type: pp.Request, Index: 1, Length: 1 << 14}, {Type: pp.Piece, Index: 7, Piece: make([]byte, 100)}, {Type: pp.Reject, Index: 1, Length: 1},
		{Type: pp.Hashes, Hashes: [][32]byte{{}}}, {Type: pp.Extended, ExtendedPayload: []byte("de")}, {Keepalive: true},
	} {
		f.Add(m.MustMarshalBinary(), false)
		f.Add(append(m.MustMarshalBinary(), m.MustMarshalBinary()...), true)
	}
	whole := randomBytes(70, 7*blob.MinPieceLength+100)
	m := metainfoOf(f, whole)
	n := newNode(f, nil)
	part, err := n.store.Partial(m)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { part.Close() })
	f.Fuzz(func(t *testing.T, sent []byte, stranger bool) {
		b := plan.NewBoard(m, part, time.Second)
		c := &conn{s: n.Swarm, address: &address{}, stranger: stranger, t: &loaded{m: m, data: &content{m: m, fetch: &Fetch{board: b}}}}
		d := pp.Decoder{R: bufio.NewReader(bytes.NewReader(sent)), MaxLength: 4 * plan.MaxBlock}
		fields := 0
		for {
			var msg pp.Message
			if d.Decode(&msg) != nil {
				return
			}
			if msg.Keepalive {
				continue
			}
			switch c.judge(&msg) {
			case refuse:
				return
			case silence:
				continue
			}
			i := int(msg.Index)
			switch msg.Type {
			case pp.Have:
				if i >= m.NumPieces() || stranger {
					t.Fatalf("passed %+v", msg)
				}
			case pp.Bitfield, pp.HaveAll, pp.HaveNone:
				if fields++; fields > 1 || stranger {
					t.Fatalf("passed %+v", msg)
				}
			case pp.Request:
				if i >= m.NumPieces() || int64(msg.Begin)+int64(msg.Length) > m.PieceSize(i) {
					t.Fatalf("passed %+v", msg)
				}
			case pp.Piece:
				if i >= m.NumPieces() || int64(msg.Begin)+int64(len(msg.Piece)) > m.PieceSize(i) {
					t.Fatalf("passed %+v", msg)
				}
			case pp.Hashes, pp.HashRequest, pp.Extended:
				t.Fatalf("passed %+v", msg)
			}
		}
	})
}
