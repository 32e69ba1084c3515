package agent

import (
	"context"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
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
)

const (
	// defaultInterval is used until a tracker has said its own.
	defaultInterval = 10 * time.Second
	// wantInterval is how often a download asks for more peers: others that began at the same time are found soon.
	wantInterval = 2 * time.Second
	// farewell bounds what shutdown waits for the tracker.
	farewell = 2 * time.Second
)

// announcer tells the tracker what this agent fetches and holds: one batched request an interval, at once for what is new.
type announcer struct {
	a      *Agent
	client *announce.Client
	peer   announce.Peer

	mu       sync.Mutex
	held     map[digest.Digest]announce.BlobState
	pending  []announce.BlobState // events to send with the next request
	kick     chan struct{}
	interval time.Duration
	err      error
}

func newAnnouncer(a *Agent, c *announce.Client, addr []string) *announcer {
	id := a.swarm.PeerID()
	node := a.cfg.Node
	if node == "" {
		if h, err := os.Hostname(); err == nil {
			node = h
		}
	}
	return &announcer{
		a: a, client: c, peer: announce.Peer{ID: hex.EncodeToString(id[:]), Addr: addr, Node: node},
		held: map[digest.Digest]announce.BlobState{}, kick: make(chan struct{}, 1), interval: defaultInterval,
	}
}

// peerAddr is what other agents dial: the configured address, or the listener's own. A listener on all addresses needs a
// configured one.
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
	resp, err := n.client.Announce(ctx, announce.Request{Version: announce.Version, Peer: n.peer, Blobs: states})
	n.mu.Lock()
	defer n.mu.Unlock()
	n.err = err
	if err == nil && resp.Interval > 0 {
		n.interval = max(resp.Interval, time.Second)
	}
	return resp, err
}

// state is the error of the last announce.
func (n *announcer) state() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.err
}

func (n *announcer) completed(repo string, m *blob.Metainfo, received int64) {
	s := announce.BlobState{Digest: m.Digest, Repository: repo, Size: m.Size, Downloaded: received}
	n.mu.Lock()
	n.held[m.Digest] = s
	s.Event = announce.EventCompleted
	n.pending = append(n.pending, s)
	n.mu.Unlock()
	n.wake()
}

func (n *announcer) gone(d digest.Digest) {
	n.mu.Lock()
	if s, ok := n.held[d]; ok {
		delete(n.held, d)
		s.Event, s.Left = announce.EventStopped, s.Size
		n.pending = append(n.pending, s)
	}
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
	if err := n.findHeld(); err != nil {
		return err
	}
	var last time.Time
	for {
		full := time.Since(last) >= n.nextFull()
		states, wanted := n.batch(full)
		if full {
			last = time.Now()
		}
		for chunk := range slices.Chunk(states, announce.MaxBlobs) {
			sctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			resp, err := n.send(sctx, chunk)
			cancel()
			if err != nil {
				if ctx.Err() == nil {
					n.a.m.trackerErrors.Inc()
					n.a.log.Debug("announce failed", "blobs", len(chunk), "error", err)
				}
				n.again(chunk)
				break
			}
			n.feed(resp)
		}
		wait := n.nextFull() - time.Since(last)
		if wanted {
			wait = min(wait, wantInterval)
		}
		// Jitter of a tenth keeps agents that began together from announcing together for ever.
		wait += time.Duration(rand.Int64N(int64(max(wait, time.Second) / 10)))
		select {
		case <-ctx.Done():
			return n.leave()
		case <-n.kick:
		case <-time.After(max(wait, 100*time.Millisecond)):
		}
	}
}

func (n *announcer) nextFull() time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.interval
}

// batch is what to send now: events, downloads, and at a full interval everything that is held.
func (n *announcer) batch(full bool) (states []announce.BlobState, wanted bool) {
	n.mu.Lock()
	states, n.pending = n.pending, nil
	if full {
		for _, s := range n.held {
			states = append(states, s)
		}
	}
	n.mu.Unlock()
	for p, f := range n.a.fetching() {
		wanted = true
		states = append(states, announce.BlobState{Digest: p.digest, Repository: p.repo, Size: p.size, Left: p.left(), Downloaded: received(f), Want: true})
	}
	if len(states) > 0 {
		sent := n.a.swarm.Sent()
		for i := range states {
			states[i].Uploaded = sent[states[i].Digest]
		}
	}
	return states, wanted
}

// received is how many bytes a fetch has got and verified.
func received(f *swarm.Fetch) int64 {
	s := f.Stats()
	return s.BytesFromPeers + s.BytesFromOrigins
}

// again keeps the events of a request that failed. What is held and fetched is in the next request anyway.
func (n *announcer) again(states []announce.BlobState) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, s := range states {
		if s.Event != announce.EventNone && len(n.pending) < announce.MaxBlobs {
			n.pending = append(n.pending, s)
		}
	}
}

// feed gives the peers of an answer to the downloads. Known ones are fed again: one whose first dial failed is tried anew.
func (n *announcer) feed(resp announce.Response) {
	for _, b := range resp.Blobs {
		if peers := toPeers(b.Peers); len(peers) > 0 {
			n.a.addPeers(b.Digest, peers)
		}
	}
}

// findHeld fills held from the cache, so that a restarted agent seeds what it has.
func (n *announcer) findHeld() error {
	err := n.a.store.List(func(i store.Info) error {
		if i.Size <= n.a.smallBlob {
			return nil
		}
		n.mu.Lock()
		n.held[i.Digest] = announce.BlobState{Digest: i.Digest, Size: i.Size}
		n.mu.Unlock()
		return nil
	})
	if err != nil {
		return fmt.Errorf("list the cache: %w", err)
	}
	return nil
}

// leave tells the tracker that this agent seeds nothing any more, within a bound.
func (n *announcer) leave() error {
	ctx, cancel := context.WithTimeout(context.Background(), farewell)
	defer cancel()
	n.mu.Lock()
	var states []announce.BlobState
	for _, s := range n.held {
		s.Event = announce.EventStopped
		states = append(states, s)
	}
	n.mu.Unlock()
	for chunk := range slices.Chunk(states, announce.MaxBlobs) {
		if _, err := n.send(ctx, chunk); err != nil {
			n.a.log.Info("tracker was not told that this agent stops; it forgets by itself", "error", err)
			break
		}
	}
	return nil
}

// fetching lists the pulls that swarm now.
func (a *Agent) fetching() map[*pull]*swarm.Fetch {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := map[*pull]*swarm.Fetch{}
	for _, p := range a.pulls {
		p.mu.Lock()
		if p.fetch != nil {
			out[p] = p.fetch
		}
		p.mu.Unlock()
	}
	return out
}

func (a *Agent) addPeers(d digest.Digest, peers []swarm.Peer) {
	a.mu.Lock()
	p := a.pulls[d]
	a.mu.Unlock()
	if p == nil {
		return
	}
	p.mu.Lock()
	f := p.fetch
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
