package tracker

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/announce"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/ring"
	"kraken/proto/transport"
)

const (
	// metainfoBudget is how long a batched announce waits for metainfo. Agents give the whole round trip a second; an
	// answer with peers and without metainfo is worth more to them than none.
	metainfoBudget = 750 * time.Millisecond
	// maxAnswerMetainfo bounds the metainfo in one answer in bytes. The first blob always gets its own.
	maxAnswerMetainfo = 16 << 20
)

// batched takes the announce of an agent: registers all, then answers for the blobs that it asks about.
func (t *Tracker) batched(ctx context.Context, c caller, r *announce.Request) (announce.Response, error) {
	id, err := r.Peer.PeerID()
	if err != nil {
		return announce.Response{}, fmt.Errorf("%w: %w", announce.ErrInvalid, err)
	}
	if p := c.named; p != (transport.Principal{}) {
		if id != announce.PeerIDOf(p) {
			return announce.Response{}, fmt.Errorf("%w: %s announces under the peer id %s, which is not its own", registry.ErrDenied, p, id)
		}
		// nobody else can have this id, whatever its key was before a restart
		r.Peer.Node, r.Peer.Key = p.ID, p.String()
	}
	addrs, err := r.Peer.Addrs()
	if err != nil {
		return announce.Response{}, fmt.Errorf("%w: %w", announce.ErrInvalid, err)
	}
	for i := range r.Blobs {
		if repo := r.Blobs[i].Repository; repo != "" {
			if err := registry.CheckName(repo); err != nil {
				return announce.Response{}, err
			}
		}
	}
	t.m.batched.Inc()
	t.m.blobs.Add(float64(len(r.Blobs)))
	who := identity{id: id, node: r.Peer.Node, source: c.source, key: keyHashOf(r.Peer.Key)}
	var doubtful string
	who.addrs, who.unproven, doubtful = t.believe(ctx, c, addrs)
	kept := t.store.register(who, r.Blobs)

	asked := wanted(r.Blobs)
	found := t.metainfoFor(ctx, c, asked)
	if kept.why == whyUnknown { // an origin knows some of them after all
		kept = t.again(who, asked, found, kept)
	}
	t.m.refused.Add(float64(kept.refused))
	out := announce.Response{
		Version: announce.Version, Interval: time.Duration(t.cfg.Interval), Blobs: make([]announce.BlobAnswer, 0, len(asked)),
		Warning: cmp.Or(doubtful, kept.why),
	}
	to := asking{id, c.addr.IsLoopback()}
	room := maxAnswerMetainfo
	for i, s := range asked {
		a := announce.BlobAnswer{Digest: s.Digest}
		switch f := found[i]; {
		case f.err != nil:
			a.Error = transport.Public(f.err)
		case f.info == nil:
		case len(f.info.encoded) > room && room < maxAnswerMetainfo:
			a.Error = "this answer has no room for more metainfo, ask again"
		default:
			a.Metainfo = f.info.encoded
			room -= len(a.Metainfo)
		}
		if s.Want {
			a.Peers = wirePeers(t.store.handout(s.Digest, to, t.cfg.PeersPerAnswer).peers)
			a.Origins = t.ownersOf(s.Digest)
		}
		out.Blobs = append(out.Blobs, a)
	}
	return out, nil
}

// again registers the states whose digest was taken for unknown until its metainfo was found.
func (t *Tracker) again(who identity, asked []announce.BlobState, all []found, kept outcome) outcome {
	var states []announce.BlobState
	for i, f := range all {
		if f.info != nil && !t.store.has(who.id, asked[i].Digest) {
			states = append(states, asked[i])
		}
	}
	if len(states) == 0 {
		return kept
	}
	second := t.store.register(who, states)
	kept.refused += second.refused - len(states)
	if kept.refused == 0 {
		kept.why = second.why
	}
	for i, f := range all {
		if f.info != nil {
			t.store.learn(asked[i].Digest, f.info.hash, f.info.size)
		}
	}
	return kept
}

// wanted are the states that ask for something, one for each digest.
func wanted(states []announce.BlobState) []announce.BlobState {
	var out []announce.BlobState
	at := map[digest.Digest]int{}
	for _, s := range states {
		if (!s.Want && !s.NeedMetainfo) || s.Event == announce.EventStopped {
			continue
		}
		if i, there := at[s.Digest]; there {
			out[i].Want = out[i].Want || s.Want
			out[i].NeedMetainfo = out[i].NeedMetainfo || s.NeedMetainfo
			continue
		}
		at[s.Digest] = len(out)
		out = append(out, s)
	}
	return out
}

// found is what came of looking for a metainfo; both are nil when none was asked for.
type found struct {
	info *info
	err  error
}

// metainfoFor looks for all at once, within the budget.
func (t *Tracker) metainfoFor(ctx context.Context, c caller, asked []announce.BlobState) []found {
	ctx, cancel := context.WithTimeout(ctx, metainfoBudget)
	defer cancel()
	out := make([]found, len(asked))
	var wg sync.WaitGroup
	for i, s := range asked {
		if !s.NeedMetainfo {
			continue
		}
		repo := s.Repository
		if repo == "" {
			repo = cluster.AnyRepository
		}
		if known, ok := t.metainfos.cached(repo, s.Digest); ok {
			t.m.metainfoHits.Inc()
			out[i].info = known
			continue
		}
		wg.Go(func() { out[i].info, out[i].err = t.metainfos.get(ctx, question{repo, s.Digest}, c.source) })
	}
	wg.Wait()
	for _, f := range out {
		if f.info != nil {
			t.store.learn(f.info.digest, f.info.hash, f.info.size)
		}
	}
	return out
}

// ownersOf are the owners of d, best first.
func (t *Tracker) ownersOf(d digest.Digest) []ring.Member {
	owners := t.origins.Owners(d)
	out := make([]ring.Member, len(owners))
	for i, o := range owners {
		out[i] = o.Member
	}
	return out
}

func wirePeers(in []candidate) []announce.Peer {
	out := make([]announce.Peer, len(in))
	for i, c := range in {
		out[i] = announce.Peer{ID: c.id.String(), Complete: c.complete}
		for _, a := range c.addrs {
			if a.IsValid() {
				out[i].Addr = append(out[i].Addr, a.String())
			}
		}
	}
	return out
}

// stock takes the announce of a BitTorrent client. The error is for a person.
func (t *Tracker) stock(ctx context.Context, c caller, q announce.Query) (announce.Reply, error) {
	d, size, ok := t.swarmOf(q)
	if !ok {
		return announce.Reply{}, fmt.Errorf("no blob with info-hash %s is known here: get its .torrent from this tracker again", q.InfoHash)
	}
	who := identity{id: q.PeerID, stock: true, source: c.source, key: keyHashOf(q.Key)}
	said, doubtful := c.addr, ""
	if q.IP.IsValid() && t.cfg.TrustAnnouncedIP {
		said = q.IP
	}
	if q.Port != 0 {
		var addrs [2]netip.AddrPort
		addrs[family(said)] = netip.AddrPortFrom(said, q.Port)
		who.addrs, _, doubtful = t.believe(ctx, c, addrs)
	}
	state := announce.BlobState{Digest: d, Event: q.Event, Size: size, Left: q.Left, Uploaded: q.Uploaded, Downloaded: q.Downloaded}
	t.m.stock.Inc()
	t.m.blobs.Inc()
	kept := t.store.register(who, []announce.BlobState{state})
	t.m.refused.Add(float64(kept.refused))
	t.store.learn(d, q.InfoHash, size)

	reply := announce.Reply{Interval: time.Duration(t.cfg.Interval), Warning: cmp.Or(doubtful, kept.why)}
	want := t.cfg.PeersPerAnswer
	if q.NumWant >= 0 {
		want = min(want, q.NumWant)
	}
	if q.Event == announce.EventStopped {
		want = 0
	}
	var origins []announce.ReplyPeer
	if q.Left != 0 { // a seed has no use for other seeds
		origins = t.originPeers(ctx, d)
	}
	origins = origins[:min(len(origins), want)]
	h := t.store.handout(d, asking{q.PeerID, c.addr.IsLoopback()}, want-len(origins))
	reply.Complete, reply.Incomplete = h.seeds+len(t.origins.Owners(d)), h.leechers
	reply.Peers = origins
	for _, c := range h.peers {
		for _, a := range c.addrs {
			if a.IsValid() {
				reply.Peers = append(reply.Peers, announce.ReplyPeer{ID: c.id, Addr: a})
			}
		}
	}
	return reply, nil
}

// family is the place of an address in a pair: 0 for IPv4, 1 for IPv6.
func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// swarmOf finds the blob of an info-hash.
func (t *Tracker) swarmOf(q announce.Query) (d digest.Digest, size int64, ok bool) {
	if i, ok := t.metainfos.find(q.InfoHash); ok {
		return i.digest, i.size, true
	}
	return t.store.lookup(q.InfoHash)
}

// originPeers are the peer listeners of the owners of d.
func (t *Tracker) originPeers(ctx context.Context, d digest.Digest) []announce.ReplyPeer {
	var out []announce.ReplyPeer
	for _, o := range t.origins.Owners(d) {
		addrs, err := t.hosts.resolve(ctx, o.Peer)
		if err != nil {
			t.log.Warn("a stock client is not given this origin", "origin", o.ID, "error", err)
		}
		for _, a := range addrs {
			out = append(out, announce.ReplyPeer{Addr: a})
		}
	}
	return out
}
