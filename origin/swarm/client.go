package swarm

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"github.com/anacrolix/torrent"
	"github.com/anacrolix/torrent/metainfo"
	pp "github.com/anacrolix/torrent/peer_protocol"
	"github.com/anacrolix/torrent/storage"
	"golang.org/x/time/rate"

	"kraken/proto/announce"
	"kraken/proto/transport"
)

const (
	// peerIDPrefix names the program and the version of its behaviour towards other peers (BEP 20).
	peerIDPrefix = announce.OwnPrefix
	// ownPrefix is what the ids of all versions have in common.
	ownPrefix = "-KN"
)

func isOwn(id [20]byte) bool { return strings.HasPrefix(string(id[:]), ownPrefix) }

// wakeUp is how often a connection that is of use looks again for what it could send, and says keep-alive when there is
// nothing. The library's writer loses a wake-up that comes after it has filled its buffer and before it waits (v1.61.0,
// peerConnMsgWriter.run): a request would then lie for its default of a minute.
const wakeUp = 500 * time.Millisecond

// clientConfig turns the library into a plain TCP peer without any discovery of its own.
func (s *Swarm) clientConfig() *torrent.ClientConfig {
	c := torrent.NewDefaultClientConfig()
	c.Bep20 = peerIDPrefix
	if p := s.cfg.TLS.Self; p != (transport.Principal{}) {
		id := announce.PeerIDOf(p)
		c.PeerID = string(id[:])
	}
	c.DisableTrackers, c.NoDHT, c.DisablePEX, c.DisableWebtorrent, c.DisableWebseeds = true, true, true, true, true
	c.NoDefaultPortForwarding = true
	// The library's own sockets are off; ours are added to it.
	c.DisableTCP, c.DisableUTP = true, true
	c.ListenPort = 0
	c.AlwaysWantConns = true // torrents are added when peers ask for them
	// BEP 6 alone: without BEP 10 there is no peer exchange, no metadata exchange, no hole punching to be abused for
	// dialling others.
	c.Extensions = pp.NewPeerExtensionBytes(pp.ExtensionBitFast)
	c.HeaderObfuscationPolicy = torrent.HeaderObfuscationPolicy{Preferred: false, RequirePreferred: !s.cfg.StockPeers}
	c.Seed = true
	c.DropDuplicatePeerIds = true // the connection that the higher peer id dialled stays: both ends know
	c.DropMutuallyCompletePeers = true
	c.EstablishedConnsPerTorrent = s.cfg.MaxConnsPerBlob
	c.HalfOpenConnsPerTorrent = s.cfg.MaxConnsPerBlob
	c.TotalHalfOpenConns = s.cfg.MaxConns
	c.DialRateLimiter = rate.NewLimiter(rate.Inf, 1)
	c.NominalDialTimeout, c.MinDialTimeout = 5*time.Second, 3*time.Second
	c.HandshakesTimeout = 10 * time.Second // of dialled ones; accepted ones have handshakeTime
	c.KeepAliveTimeout = wakeUp
	c.UploadRateLimiter = s.limiter.Library()
	c.MaxUnverifiedBytes = 0       // a bound makes every node want the same low pieces
	c.DefaultStorage = noStorage{} // the library's own would leave a .torrent.db in the working directory
	c.Slogger = slog.New(demoted{s.log.Handler()})
	c.Callbacks = torrent.Callbacks{
		CompletedHandshake:             s.completedHandshake,
		ReadMessage:                    s.readMessage,
		PeerConnClosed:                 s.connClosed,
		ReceiveEncryptedHandshakeSkeys: s.index.each,
		PeerConnAdded:                  []func(*torrent.PeerConn){s.connAdded},
		ReceivedUsefulData:             []func(torrent.ReceivedUsefulDataEvent){s.receivedBlock},
		SentRequest:                    []func(torrent.PeerRequestEvent){s.askedBlock},
		DeletedRequest:                 []func(torrent.PeerRequestEvent){s.unaskedBlock},
	}
	return c
}

// demoted makes debug messages of the library's warnings, and drops the rest: what matters is said by this package.
type demoted struct{ slog.Handler }

func (d demoted) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelWarn && d.Handler.Enabled(ctx, slog.LevelDebug)
}

func (d demoted) Handle(ctx context.Context, r slog.Record) error {
	r.Level = slog.LevelDebug
	return d.Handler.Handle(ctx, r)
}

func (d demoted) WithAttrs(a []slog.Attr) slog.Handler { return demoted{d.Handler.WithAttrs(a)} }
func (d demoted) WithGroup(n string) slog.Handler      { return demoted{d.Handler.WithGroup(n)} }

// noStorage is for torrents that were added without one; there are none.
type noStorage struct{}

// OpenTorrent implements storage.ClientImpl.
func (noStorage) OpenTorrent(context.Context, *metainfo.Info, metainfo.Hash) (storage.TorrentImpl, error) {
	return storage.TorrentImpl{}, ErrClosed
}
