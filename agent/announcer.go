package agent

import (
	"context"
	crand "crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/origin/store"
	"kraken/origin/swarm"
	"kraken/proto/announce"
	"kraken/proto/blob"
	"kraken/proto/role"
	"kraken/proto/transport"
)

const (
	// defaultInterval is used until a tracker has said its own.
	defaultInterval = 10 * time.Second
	// wantInterval is how often a young download asks for more peers: others that began at the same time are found
	// soon.
	wantInterval = 2 * time.Second
	// youth is for how long a download is young.
	youth = 20 * time.Second
	// minGap lies between two requests, so that what happens at the same time shares one.
	minGap = 200 * time.Millisecond
	// farewell bounds what shutdown waits for the tracker.
	farewell = 2 * time.Second
	// announceBudget is how long a request in the background may take.
	announceBudget = 5 * time.Second
)

// announcer tells the tracker what this agent fetches, and what it holds that was used lately: one batched request an
// interval, and at once what is new. A blob that nobody has used for a while is not announced: a cache of 10,000 blobs
// on each of 10,000 nodes is more than a tracker should know, and who wants such a blob leases it from its origins, and
// announces it.
type announcer struct {
	a       announced
	tracker announcing
	peer    announce.Peer
	log     *slog.Logger
	errors  interface{ Inc() }

	mu       sync.Mutex
	told     map[digest.Digest]announce.BlobState // what the tracker believes of this agent
	pending  []announce.BlobState                 // events to send with the next request
	kick     chan struct{}
	interval time.Duration
	err      error
	warning  string // the tracker's last
}

// announced is what there is to be announced; the Agent.
type announced interface {
	// lately are the blobs that are held and were used lately, the last used first, at most announce.MaxBlobs.
	lately() []store.Info
	// downloads are the blobs that are fetched; young says that one of them has begun lately.
	downloads() (states []announce.BlobState, young bool)
	// bytesSent are the bytes that went to peers, by blob.
	bytesSent() map[digest.Digest]int64
	addPeers(d digest.Digest, peers []swarm.Peer)
}

// announcing is a tracker; announce.Client.
type announcing interface {
	Announce(ctx context.Context, r announce.Request) (announce.Response, error)
}

func newAnnouncer(a announced, t announcing, peer announce.Peer, log *slog.Logger, errors interface{ Inc() }) *announcer {
	return &announcer{
		a: a, tracker: t, peer: peer, log: log, errors: errors,
		told: map[digest.Digest]announce.BlobState{}, kick: make(chan struct{}, 1), interval: defaultInterval,
	}
}

// self returns how this agent is known to others.
func (a *Agent) self(addr []string) announce.Peer {
	id := a.swarm.PeerID()
	node := a.cfg.Node
	if node == "" {
		if h, err := os.Hostname(); err == nil {
			node = h
		}
	}
	return announce.Peer{ID: hex.EncodeToString(id[:]), Addr: addr, Node: node, Key: crand.Text()}
}

// trackerClient returns a client that announces from the address that is announced: a tracker gives a node to others
// only where it is announced from.
func trackerClient(cfg transport.ClientConfig, addr []string, log *slog.Logger) (*http.Client, error) {
	for _, s := range addr {
		if ap, err := netip.ParseAddrPort(s); err == nil && !ap.Addr().IsLoopback() {
			cfg.From = ap.Addr().Unmap()
		}
	}
	return transport.NewClient(cfg, log)
}

// peerAddr returns what other agents dial: the configured address, or the listener's own. A listener on all addresses
// needs a configured one.
func peerAddr(advertise string, bound netip.AddrPort) ([]string, error) {
	if advertise == "" {
		if bound.Addr().IsUnspecified() {
			return nil, fmt.Errorf("peer.advertise is needed: peer.listen %s is no address that others can dial", bound)
		}
		return []string{bound.String()}, nil
	}
	ap, err := netip.ParseAddrPort(advertise)
	if err != nil {
		addr, aerr := netip.ParseAddr(advertise)
		if aerr != nil {
			return nil, fmt.Errorf("peer.advertise %q: want an IP address or ip:port", advertise)
		}
		ap = netip.AddrPortFrom(addr, bound.Port())
	}
	return []string{ap.String()}, nil
}

// ask announces one blob and waits for the answer.
func (n *announcer) ask(ctx context.Context, s announce.BlobState) (announce.BlobAnswer, error) {
	resp, err := n.send(ctx, []announce.BlobState{s})
	if err != nil {
		return announce.BlobAnswer{}, err
	}
	for _, b := range resp.Blobs {
		if b.Digest == s.Digest {
			return b, nil
		}
	}
	return announce.BlobAnswer{}, fmt.Errorf("tracker's answer lacks %s", s.Digest)
}

func (n *announcer) send(ctx context.Context, states []announce.BlobState) (announce.Response, error) {
	n.mu.Lock()
	for _, s := range states {
		if s.Event != announce.EventStopped {
			s.Event, s.Want, s.NeedMetainfo = announce.EventNone, false, false
			n.told[s.Digest] = s
		}
	}
	n.mu.Unlock()
	resp, err := n.tracker.Announce(ctx, announce.Request{Version: announce.Version, Peer: n.peer, Blobs: states})
	n.mu.Lock()
	defer n.mu.Unlock()
	n.err = err
	if err == nil && resp.Warning != n.warning {
		if n.warning = resp.Warning; n.warning != "" {
			n.log.Warn("tracker: " + n.warning)
		}
	}
	if err == nil && resp.Interval > 0 {
		n.interval = max(resp.Interval, time.Second)
	}
	return resp, err
}

// state returns the error of the last announce.
func (n *announcer) state() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.err
}

func (n *announcer) completed(repo string, m *blob.Metainfo, received int64) {
	n.event(announce.BlobState{Digest: m.Digest, Repository: repo, Size: m.Size, Downloaded: received, Event: announce.EventCompleted})
}

// gone tells the tracker, soon, that a blob was evicted or that its pull has ended without it.
func (n *announcer) gone(d digest.Digest) {
	n.mu.Lock()
	s, known := n.told[d]
	delete(n.told, d)
	n.mu.Unlock()
	if known {
		s.Event, s.Left = announce.EventStopped, s.Size
		n.event(s)
	}
}

func (n *announcer) event(s announce.BlobState) {
	n.mu.Lock()
	if s.Event != announce.EventStopped {
		n.told[s.Digest] = s
	}
	n.pending = append(n.pending, s)
	n.mu.Unlock()
	n.wake()
}

func (n *announcer) wake() {
	select {
	case n.kick <- struct{}{}:
	default:
	}
}

// run announces until ctx is done, then says farewell for everything.
func (n *announcer) run(ctx context.Context) error {
	due := time.Now() // when everything is announced again
	fails := 0
	for {
		full := !time.Now().Before(due)
		states, young := n.batch(full)
		err := n.sendAll(ctx, states)
		switch {
		case err != nil:
			// Soon again, and everything: it may have been restarted, and know nothing.
			due = time.Now().Add(jittered(min(time.Second<<min(fails, 5), n.nextFull())))
			fails++
		case full:
			due = time.Now().Add(jittered(n.nextFull()))
			fails = 0
		}
		wait := time.Until(due)
		kick := n.kick
		if fails > 0 {
			kick = nil
		} else if young {
			wait = min(wait, jittered(wantInterval))
		}
		if !role.Pause(ctx, minGap) {
			return n.leave()
		}
		t := time.NewTimer(max(wait-minGap, 0))
		select {
		case <-ctx.Done():
			t.Stop()
			return n.leave()
		case <-kick:
		case <-t.C:
		}
		t.Stop()
	}
}

// jittered adds up to a tenth, which keeps agents that began together from announcing together for ever.
func jittered(d time.Duration) time.Duration { return d + time.Duration(rand.Int64N(int64(d)/10+1)) }

// sendAll sends states, in one request unless there are more than one takes.
func (n *announcer) sendAll(ctx context.Context, states []announce.BlobState) error {
	for i := 0; i < len(states); i += announce.MaxBlobs {
		chunk := states[i:min(i+announce.MaxBlobs, len(states))]
		sctx, cancel := context.WithTimeout(ctx, announceBudget)
		resp, err := n.send(sctx, chunk)
		cancel()
		if err != nil {
			if ctx.Err() == nil {
				n.errors.Inc()
				n.log.Debug("announce failed", "blobs", len(chunk), "error", err)
			}
			n.again(states[i:])
			return err
		}
		n.feed(resp)
	}
	return nil
}

func (n *announcer) nextFull() time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.interval
}

// batch returns what to send now: events, downloads, and when everything is due also what was used lately. Each blob is
// in it once, with its last event.
func (n *announcer) batch(full bool) (states []announce.BlobState, young bool) {
	downloads, young := n.a.downloads()
	var held []store.Info
	if full {
		held = n.a.lately()
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	at := map[digest.Digest]int{}
	for _, s := range n.pending {
		if i, there := at[s.Digest]; there {
			states[i] = s
			continue
		}
		at[s.Digest] = len(states)
		states = append(states, s)
	}
	n.pending = nil
	for _, s := range downloads {
		if i, there := at[s.Digest]; there {
			states[i] = s // fetched again
			continue
		}
		at[s.Digest] = len(states)
		states = append(states, s)
	}
	for _, i := range held {
		if _, there := at[i.Digest]; there || len(states) >= announce.MaxBlobs {
			continue
		}
		at[i.Digest] = len(states)
		last := n.told[i.Digest]
		states = append(states, announce.BlobState{Digest: i.Digest, Repository: last.Repository, Size: i.Size, Downloaded: last.Downloaded})
	}
	if full {
		for d := range n.told {
			if _, there := at[d]; !there {
				delete(n.told, d) // the tracker will forget it, too
			}
		}
	}
	if len(states) > 0 {
		sent := n.a.bytesSent()
		for i := range states {
			states[i].Uploaded = sent[states[i].Digest]
		}
	}
	return states, young
}

// received returns how many bytes a fetch has got and verified.
func received(f *swarm.Fetch) int64 {
	s := f.Stats()
	return s.BytesFromPeers + s.BytesFromOrigins
}

// again keeps the events of a request that failed, before those that came meanwhile. What is held and fetched is in the
// next one anyway.
func (n *announcer) again(states []announce.BlobState) {
	var events []announce.BlobState
	for _, s := range states {
		if s.Event != announce.EventNone {
			events = append(events, s)
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	all := append(events, n.pending...)
	n.pending = all[max(0, len(all)-announce.MaxBlobs):]
}

// feed gives the peers of an answer to the downloads. Known ones are fed again: one whose first dial failed is tried
// anew.
func (n *announcer) feed(resp announce.Response) {
	for _, b := range resp.Blobs {
		if peers := toPeers(b.Peers); len(peers) > 0 {
			n.a.addPeers(b.Digest, peers)
		}
	}
}

// leave tells the tracker that this agent seeds nothing any more, within a bound.
func (n *announcer) leave() error {
	ctx, cancel := context.WithTimeout(context.Background(), farewell)
	defer cancel()
	n.mu.Lock()
	all := maps.Clone(n.told)
	for _, s := range n.pending {
		all[s.Digest] = s // an eviction that the tracker does not know of yet is in told no more
	}
	n.mu.Unlock()
	var states []announce.BlobState
	for _, s := range all {
		s.Event = announce.EventStopped
		states = append(states, s)
	}
	for chunk := range slices.Chunk(states, announce.MaxBlobs) {
		if _, err := n.send(ctx, chunk); err != nil {
			n.log.Info("tracker was not told that this agent stops; it forgets by itself", "error", err)
			break
		}
	}
	return nil
}

// lately returns the blobs that were pulled, read, or asked for by a peer lately, as far as peers can have them.
func (a *Agent) lately() []store.Info {
	a.store.Touch(a.swarm.Asked()...)
	return a.store.Recent(time.Now().Add(-time.Duration(a.cfg.Peer.AnnounceFor)), announce.MaxBlobs, func(i store.Info) bool {
		return i.Size > a.smallBlob && a.swarm.Seeds(i.Digest)
	})
}

// downloads returns the pulls that swarm now, and whether one of them is young.
func (a *Agent) downloads() (states []announce.BlobState, young bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, p := range a.pulls {
		p.mu.Lock()
		if r := p.report; r.fetch != nil {
			states = append(states, announce.BlobState{
				Digest: p.digest, Repository: p.repo, Size: r.size, Left: r.missing(), Downloaded: received(r.fetch), Want: true,
			})
			young = young || time.Since(p.began) < youth
		}
		p.mu.Unlock()
	}
	return states, young
}

func (a *Agent) bytesSent() map[digest.Digest]int64 { return a.swarm.BytesSent() }

func (a *Agent) addPeers(d digest.Digest, peers []swarm.Peer) {
	a.mu.Lock()
	p := a.pulls[d]
	a.mu.Unlock()
	if p == nil {
		return
	}
	p.mu.Lock()
	f := p.report.fetch
	p.mu.Unlock()
	if f != nil {
		f.AddPeers(peers)
	}
}

// toPeers drops what is no address: the tracker is believed about peers only as far as one can dial.
func toPeers(in []announce.Peer) []swarm.Peer {
	var out []swarm.Peer
	for _, p := range in {
		var id [20]byte
		if b, err := hex.DecodeString(p.ID); err == nil && len(b) == len(id) {
			copy(id[:], b)
		}
		for _, s := range p.Addr {
			if ap, err := netip.ParseAddrPort(s); err == nil && ap.Port() != 0 {
				out = append(out, swarm.Peer{ID: id, Addr: ap})
			}
		}
	}
	return out
}
