package swarm

import (
	"crypto/tls"

	"github.com/anacrolix/torrent"
	"github.com/anacrolix/torrent/metainfo"
	pp "github.com/anacrolix/torrent/peer_protocol"

	"kraken/origin/swarm/plan"
	"kraken/proto/announce"
	"kraken/proto/blob"
	"kraken/proto/transport"
)

// The library panics on some messages that a peer is free to send, among them: Hashes for a torrent without version 2
// metadata, a block that reaches beyond its piece, and HaveNone after HaveAll (at the next drop of the torrent).
// readMessage looks at every message before the library does and turns what is not allowed into one that it refuses.

// unknownMessage is a type that ends the connection.
const unknownMessage = pp.MessageType(0xff)

// completedHandshake decides about a peer once its id and the info-hash are known. For an accepted connection it runs
// before the library looks for the torrent, and without its lock.
func (s *Swarm) completedHandshake(pc *torrent.PeerConn, hash metainfo.Hash) {
	c := connOf(&pc.Peer)
	if c == nil {
		return
	}
	c.id, c.stranger = pc.PeerID, !isOwn(pc.PeerID)
	c.peer = plan.Peer{ID: c.id, Conn: c}
	if !c.mayBe(pc.PeerID) {
		s.m.refused.Inc()
		s.m.handshakes.WithLabelValues(transport.HandshakeIdentity, "us").Inc()
		s.reach.say(transport.HandshakeIdentity, func() {
			s.log.Warn("a peer has another id than belongs to its certificate: it is not traded with", "peer", c.address.addr, "id", idText(c.id))
		})
		c.Close()
		return
	}
	if c.stranger && !s.cfg.StockPeers || s.bans.has(c.id, c.address.addr) {
		s.m.refused.Inc()
		c.Close()
		return
	}
	t := s.find(blob.InfoHash(hash))
	if t == nil && !c.outgoing {
		t = s.load(blob.InfoHash(hash))
	}
	if t == nil {
		c.Close()
		return
	}
	if b := t.data.board(); b != nil && b.Doubted(c.id) {
		c.Close()
		return
	}
	if !s.establish(c) {
		s.m.refused.Inc()
		c.Close()
		return
	}
	c.met.Store(true)
	s.reach.reached()
	t.touch()
	if c.raw == nil || !c.plain {
		t.data.copied.Store(true)
	}
	c.t = t
}

// mayBe reports whether a peer may have this id: where its certificate names it, only the one that belongs to the name,
// so that a peer that is banned is so under any id.
func (c *conn) mayBe(id [20]byte) bool {
	t, ok := c.Conn.(*tls.Conn)
	if !ok {
		return true
	}
	certs := t.ConnectionState().PeerCertificates
	if len(certs) == 0 {
		return true // of a configuration that asks for none
	}
	p, err := transport.PrincipalOf(certs[0])
	return err != nil || announce.PeerIDOf(p) == id
}

// connAdded notes that the library has taken a connection into its torrent. The library's lock is held, as in all
// callbacks that follow.
func (s *Swarm) connAdded(pc *torrent.PeerConn) {
	c := connOf(&pc.Peer)
	if c == nil || c.t == nil {
		return
	}
	if s.find(c.t.m.InfoHash()) != c.t {
		// the torrent was dropped and added again since the handshake: all that is known of this connection is in the
		// old one
		c.Close()
		return
	}
	if b := c.t.data.board(); b != nil {
		pc.PeerMaxRequests = b.Admit(&c.peer)
	}
	c.framed = c.plain
	c.t.mu.Lock()
	c.t.conns[c] = struct{}{}
	c.t.mu.Unlock()
	select {
	case s.joined <- struct{}{}:
	default:
	}
}

func (s *Swarm) connClosed(pc *torrent.PeerConn) {
	c := connOf(&pc.Peer)
	if c == nil || c.t == nil {
		return
	}
	if b := c.t.data.board(); b != nil {
		for i := range c.t.m.NumPieces() {
			if c.all || c.have.Has(i) {
				b.Lost(i)
			}
		}
	}
	c.all, c.have = false, blob.Bitmap{}
	c.t.mu.Lock()
	defer c.t.mu.Unlock()
	delete(c.t.conns, c)
}

// readMessage passes, silences (by making a keep-alive of it) or refuses a message.
func (s *Swarm) readMessage(pc *torrent.PeerConn, m *pp.Message) {
	c := connOf(&pc.Peer)
	if m.Keepalive {
		return
	}
	if c == nil || c.t == nil {
		m.Type = unknownMessage
		return
	}
	switch c.judge(m) {
	case silence:
		*m = pp.Message{Keepalive: true}
	case refuse:
		s.m.violations.Inc()
		s.log.Debug("peer breaks the protocol", "peer", c.address.addr, "id", idText(c.id), "message", int(m.Type))
		*m = pp.Message{Type: unknownMessage}
		c.Close()
	}
}

type verdict int

const (
	pass verdict = iota
	silence
	refuse
)

func (c *conn) judge(m *pp.Message) verdict {
	info := c.t.m
	n := info.NumPieces()
	i := int(m.Index)
	if c.stranger {
		// Nothing is asked of a stranger (our blocks are too long for other clients), so what it has need not be known.
		// It may also say it in ways of its own: aria2 sends bitfields in the middle of a conversation.
		switch m.Type {
		case pp.Have, pp.Bitfield, pp.HaveAll, pp.HaveNone:
			return silence
		}
	}
	switch m.Type {
	case pp.Choke, pp.Unchoke, pp.Interested, pp.NotInterested:
		return pass
	case pp.Port, pp.Suggest, pp.AllowedFast:
		return silence
	case pp.Have:
		if i >= n {
			return refuse
		}
		c.saidHave = true
		c.holds(i)
		return pass
	case pp.Bitfield, pp.HaveAll, pp.HaveNone:
		// Once, and before any Have (BEP 3, BEP 6).
		if c.saidField || c.saidHave || m.Type == pp.Bitfield && len(m.Bitfield) != (n+7)/8*8 {
			return refuse
		}
		c.saidField = true
		c.holdsField(m, n)
		return pass
	case pp.Request:
		if i >= n || m.Length == 0 || int64(m.Length) > plan.MaxBlock || int64(m.Begin)+int64(m.Length) > info.PieceSize(i) {
			return refuse
		}
		return pass
	case pp.Cancel, pp.Reject:
		if i >= n || int64(m.Begin) >= info.PieceSize(i) {
			return refuse
		}
		return pass
	case pp.Piece:
		size := plan.BlockSize(info.PieceLength())
		if i >= n || int64(m.Begin)%size != 0 || int64(m.Begin) >= info.PieceSize(i) ||
			int64(len(m.Piece)) != min(size, info.PieceSize(i)-int64(m.Begin)) {
			return refuse
		}
		return pass
	default: // BEP 10 and BEP 52 were not offered
		return refuse
	}
}

// holds notes that the peer has piece i.
func (c *conn) holds(i int) {
	b := c.t.data.board()
	if b == nil || c.all || c.have.Has(i) {
		return
	}
	if c.have.Len() == 0 {
		c.have = blob.NewBitmap(c.t.m.NumPieces())
	}
	c.have.Set(i)
	b.Gained(i)
}

func (c *conn) holdsField(m *pp.Message, n int) {
	b := c.t.data.board()
	if b == nil {
		return
	}
	switch m.Type {
	case pp.HaveAll:
		c.all = true
		for i := range n {
			b.Gained(i)
		}
	case pp.Bitfield:
		for i := range n {
			if m.Bitfield[i] {
				c.holds(i)
			}
		}
	}
}

func (s *Swarm) receivedBlock(e torrent.ReceivedUsefulDataEvent) {
	if c := connOf(e.Peer); c != nil && c.t != nil {
		if b := c.t.data.board(); b != nil {
			ask := b.Received(int(e.Message.Index), int64(e.Message.Begin), int64(len(e.Message.Piece)), &c.peer)
			if pc, ok := e.Peer.TryAsPeerConn(); ok {
				pc.PeerMaxRequests = ask
			}
		}
	}
}

func (s *Swarm) askedBlock(e torrent.PeerRequestEvent) {
	if c := connOf(e.Peer); c != nil && c.t != nil {
		if b := c.t.data.board(); b != nil && b.Asked(int(e.Index)) {
			c.t.data.fetch.reprioritize()
		}
	}
}

func (s *Swarm) unaskedBlock(e torrent.PeerRequestEvent) {
	if c := connOf(e.Peer); c != nil && c.t != nil {
		if b := c.t.data.board(); b != nil && b.Unasked(int(e.Index)) {
			c.t.data.fetch.reprioritize()
		}
	}
}
