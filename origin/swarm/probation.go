package swarm

import (
	"github.com/anacrolix/torrent"
	pp "github.com/anacrolix/torrent/peer_protocol"

	"kraken/proto/blob"
)

// A peer that has proven nothing yet is asked for one piece's worth of blocks and no more, so that a liar spoils little before it
// is found out. After its first right piece it is asked for as much as it takes.

const (
	blockSize = 16 << 10
	// provenRequests is how many blocks a proven peer may be asked for at once: 16 MiB in flight.
	provenRequests = 1024
)

// probation sees the extended handshake (BEP 10) before the library does. Its reqq is how many requests the library will send.
func (s *Swarm) probation(pc *torrent.PeerConn, d *pp.ExtendedHandshakeMessage) {
	if s.net.trusted(pc.PeerID) {
		return
	}
	t := pc.Torrent()
	if t == nil || t.Info() == nil {
		return
	}
	if n := int(t.Info().PieceLength / blockSize); d.Reqq == 0 || d.Reqq > n {
		d.Reqq = n
	}
}

// contribution sees every block that was useful, under the library's lock.
func (s *Swarm) contribution(e torrent.ReceivedUsefulDataEvent) {
	pc, ok := e.Peer.TryAsPeerConn()
	if !ok {
		return
	}
	v, ok := s.fetches.Load(blob.InfoHash(e.Peer.Torrent().InfoHash()))
	if !ok {
		return
	}
	f := v.(*Fetch)
	blocks := f.contributed(int(e.Message.Index), pc.PeerID)
	switch trusted := s.net.trusted(pc.PeerID); {
	case trusted && pc.PeerMaxRequests < provenRequests:
		pc.PeerMaxRequests = provenRequests
	case !trusted && blocks >= int(f.m.PieceLength()/blockSize):
		// It has sent a piece's worth; the verdict on it is a moment away.
		pc.PeerMaxRequests = 1
	}
}

// contributed notes who sent a block of piece i, and returns how many blocks it has sent.
func (f *Fetch) contributed(i int, id [20]byte) int {
	f.progress.Store(nowNanos())
	f.mu.Lock()
	defer f.mu.Unlock()
	f.blocks[id]++
	if f.have.Has(i) {
		return f.blocks[id]
	}
	if f.from[i] == nil {
		f.from[i] = map[[20]byte]bool{}
	}
	f.from[i][id] = true
	return f.blocks[id]
}
