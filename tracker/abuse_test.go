package tracker

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/announce"
)

// from announces at the handler as if the connection came from an address.
type from struct {
	h    http.Handler
	addr string
}

func (f from) post(t testing.TB, peer announce.Peer, states ...announce.BlobState) (announce.Response, int) {
	t.Helper()
	body, err := json.Marshal(announce.Request{Version: announce.Version, Peer: peer, Blobs: states})
	if err != nil {
		t.Fatal(err)
	}
	r := httptest.NewRequest(http.MethodPost, "/announce", bytes.NewReader(body))
	r.RemoteAddr = netip.AddrPortFrom(netip.MustParseAddr(f.addr), 40000).String()
	w := httptest.NewRecorder()
	f.h.ServeHTTP(w, r)
	var out announce.Response
	if w.Code == http.StatusOK {
		if err := json.Unmarshal(w.Body.Bytes(), &out); err != nil {
			t.Fatal(err)
		}
	}
	return out, w.Code
}

// suspicious is a cluster that believes nobody, with its handler.
func suspicious(t testing.TB, change func(*Config)) (*testCluster, http.Handler) {
	t.Helper()
	c := newCluster(t, func(cfg *Config) {
		cfg.TrustAnnouncedIP, cfg.StockPeers = false, true
		if change != nil {
			change(cfg)
		}
	})
	return c, c.handler(prometheus.NewRegistry())
}

func idOf(i int) string { return nobody(i).id.String() }

// addrsOf are the addresses that somebody in another net is given for a blob.
func addrsOf(t testing.TB, h http.Handler, d digest.Digest) (out []string) {
	t.Helper()
	resp, _ := from{h, "10.9.9.9"}.post(t, announce.Peer{ID: idOf(9999)}, announce.BlobState{Digest: d, Left: -1, Want: true})
	for _, p := range resp.Blobs[0].Peers {
		out = append(out, p.Addr...)
	}
	slices.Sort(out)
	return out
}

// TestOnlyProvenAddresses: nobody is made to dial a third party, a machine's own metadata service, itself, or a
// privileged port.
func TestOnlyProvenAddresses(t *testing.T) {
	for name, x := range map[string]struct {
		from string
		addr []string
		want []string // that others are given
		code int
	}{
		"its own":                    {"10.0.0.1", []string{"10.0.0.1:16062"}, []string{"10.0.0.1:16062"}, 200},
		"a third party":              {"10.0.0.1", []string{"10.0.0.66:16062"}, []string{"10.0.0.1:16062"}, 200},
		"a third party's ssh":        {"10.0.0.1", []string{"10.0.0.66:22"}, nil, 200},
		"its own privileged":         {"10.0.0.1", []string{"10.0.0.1:443"}, nil, 200},
		"metadata":                   {"10.0.0.1", []string{"169.254.169.254:80"}, nil, 400},
		"metadata, high port":        {"10.0.0.1", []string{"169.254.169.254:16062"}, nil, 400},
		"metadata, mapped":           {"10.0.0.1", []string{"[::ffff:169.254.169.254]:16062"}, nil, 400},
		"loopback of others":         {"10.0.0.1", []string{"127.0.0.1:16062"}, []string{"10.0.0.1:16062"}, 200},
		"the other family, unproven": {"10.0.0.1", []string{"10.0.0.1:16062", "[2001:db8::66]:16062"}, []string{"10.0.0.1:16062"}, 200},
		"loopback from loopback":     {"127.0.0.1", []string{"127.0.0.1:16062"}, nil, 200}, // for who is there, too
		"IPv6":                       {"2001:db8::1", []string{"[2001:db8::1]:16062"}, []string{"[2001:db8::1]:16062"}, 200},
		"port 0":                     {"10.0.0.1", []string{"10.0.0.1:0"}, nil, 400},
	} {
		t.Run(name, func(t *testing.T) {
			c, h := suspicious(t, nil)
			d := c.push("a layer").Digest
			if _, code := (from{h, x.from}).post(t, announce.Peer{ID: idOf(1), Addr: x.addr}, announce.BlobState{Digest: d, Size: 7}); code != x.code {
				t.Errorf("status %d, want %d", code, x.code)
			}
			if got := addrsOf(t, h, d); !slices.Equal(got, x.want) {
				t.Errorf("others are given %v, want %v", got, x.want)
			}
		})
	}
}

// TestLoopbackForLoopback: agents of one machine find each other through loopback.
func TestLoopbackForLoopback(t *testing.T) {
	c, h := suspicious(t, nil)
	d := c.push("a layer").Digest
	f := from{h, "127.0.0.1"}
	f.post(t, announce.Peer{ID: idOf(1), Addr: []string{"127.0.0.1:16062", "[::1]:16062"}}, announce.BlobState{Digest: d, Size: 7})
	resp, _ := f.post(t, announce.Peer{ID: idOf(2)}, announce.BlobState{Digest: d, Left: -1, Want: true})
	if p := resp.Blobs[0].Peers; len(p) != 1 || len(p[0].Addr) != 2 {
		t.Errorf("given %+v", p)
	}
}

// TestBothFamilies: a node with two homes is known by both once it has announced from both with its key.
func TestBothFamilies(t *testing.T) {
	c, h := suspicious(t, nil)
	d := c.push("a layer").Digest
	me := announce.Peer{ID: idOf(1), Addr: []string{"10.0.0.1:16062", "[2001:db8::1]:16062"}, Key: "secret"}
	state := announce.BlobState{Digest: d, Size: 7}
	if resp, _ := (from{h, "10.0.0.1"}).post(t, me, state); !strings.Contains(resp.Warning, "proven") {
		t.Errorf("warning %q", resp.Warning)
	}
	for range 2 { // the second time nothing is new
		from{h, "2001:db8::1"}.post(t, me, state)
		from{h, "10.0.0.1"}.post(t, me, state)
		if got := addrsOf(t, h, d); !slices.Equal(got, me.Addr) {
			t.Errorf("others are given %v, want both", got)
		}
	}
	me.Key = "guessed"
	from{h, "2001:db8::66"}.post(t, announce.Peer{ID: me.ID, Addr: []string{"[2001:db8::66]:1600"}, Key: "guessed"}, state)
	if got := addrsOf(t, h, d); len(got) != 2 || got[1] == "[2001:db8::66]:1600" {
		t.Errorf("others are given %v", got)
	}
}

// TestPeerIDBelongsToItsSource: nobody else replaces or stops a peer while it lives, by either kind of announce.
func TestPeerIDBelongsToItsSource(t *testing.T) {
	c, h := suspicious(t, nil)
	m := c.push("a layer")
	d := m.Digest
	victim := announce.Peer{ID: idOf(1), Addr: []string{"10.0.0.1:16062"}, Node: "victim"}
	from{h, "10.0.0.1"}.post(t, victim, announce.BlobState{Digest: d, Size: 7})
	evil := from{h, "10.0.0.66"}
	stands := func(after string) {
		t.Helper()
		if got := addrsOf(t, h, d); !slices.Contains(got, "10.0.0.1:16062") {
			t.Errorf("after %s others are given %v", after, got)
		}
	}
	resp, code := evil.post(t, announce.Peer{ID: idOf(1), Addr: []string{"10.0.0.66:16062"}}, announce.BlobState{Digest: d, Size: 7, Want: true, Left: -1})
	if code != 200 || resp.Warning == "" || len(resp.Blobs) != 1 {
		t.Errorf("the impostor is answered %d %+v, want an answer with a warning", code, resp)
	}
	stands("a replacement")
	evil.post(t, announce.Peer{ID: idOf(1)}, announce.BlobState{Digest: d, Event: announce.EventStopped})
	stands("a stop")
	evil.post(t, announce.Peer{ID: idOf(2), Addr: []string{"10.0.0.1:16062"}}, announce.BlobState{Digest: d, Size: 7})
	stands("a claim of its address")
	q := "info_hash=" + escaped(m.InfoHash()) + "&peer_id=" + escaped(nobody(1).id) + "&port=16062&left=0&event=stopped"
	r := httptest.NewRequest(http.MethodGet, "/announce?"+q, nil)
	r.RemoteAddr = "10.0.0.66:40000"
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	stands("a stock client's stop: " + w.Body.String())
	// Its owner may.
	from{h, "10.0.0.1"}.post(t, victim, announce.BlobState{Digest: d, Event: announce.EventStopped})
	if got := addrsOf(t, h, d); slices.Contains(got, "10.0.0.1:16062") {
		t.Errorf("its own stop is not heard: %v", got)
	}
}

func escaped[T ~[20]byte](b T) string {
	var s strings.Builder
	for _, x := range b {
		fmt.Fprintf(&s, "%%%02x", x)
	}
	return s.String()
}

// invented are digests that no origin knows.
func invented(batch, n int) []announce.BlobState {
	out := make([]announce.BlobState, n)
	for i := range out {
		out[i] = announce.BlobState{Digest: digest.FromString(fmt.Sprint("invented ", batch, " ", i)), Size: 1 << 30}
	}
	return out
}

// TestInventedDigestsTakeNoRoom: who announces a million digests that don't exist takes neither memory nor anybody's
// place.
func TestInventedDigestsTakeNoRoom(t *testing.T) {
	c, h := suspicious(t, func(cfg *Config) {
		cfg.Limits.Pairs, cfg.Limits.Unconfirmed, cfg.Limits.SourceUnconfirmed = 5_000, 4_000, 1_000
	})
	d := c.push("a layer").Digest
	from{h, "10.0.0.1"}.post(t, announce.Peer{ID: idOf(1), Addr: []string{"10.0.0.1:16062"}}, announce.BlobState{Digest: d, Size: 7})
	evil := from{h, "10.0.0.66"}
	for i := range 20 {
		evil.post(t, announce.Peer{ID: idOf(100 + i), Addr: []string{"10.0.0.66:16062"}}, invented(i, 1000)...)
	}
	from{h, "10.0.0.2"}.post(t, announce.Peer{ID: idOf(2), Addr: []string{"10.0.0.2:16062"}}, announce.BlobState{Digest: d, Size: 7})
	if got, want := addrsOf(t, h, d), []string{"10.0.0.1:16062", "10.0.0.2:16062"}; !slices.Equal(got, want) {
		t.Errorf("others are given %v, want the honest %v", got, want)
	}
	if swarms, _, pairs := c.store.counts(); swarms > 1_001 || pairs > 1_003 {
		t.Errorf("%d swarms and %d pairs are kept of what does not exist", swarms, pairs)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := len(c.asked); n > 2*questionBurst {
		t.Errorf("origins were asked about %d digests", n)
	}
}

// TestUnknownWantedIsBounded: one announce that wants the metainfo of 1,000 digests that don't exist costs origins a
// bounded number of requests.
func TestUnknownWantedIsBounded(t *testing.T) {
	c, h := suspicious(t, nil)
	states := invented(0, 1000)
	for i := range states {
		states[i].Left, states[i].Want, states[i].NeedMetainfo = -1, true, true
	}
	for range 3 {
		from{h, "10.0.0.66"}.post(t, announce.Peer{ID: idOf(1)}, states...)
	}
	c.mu.Lock()
	n := 0
	for _, k := range c.asked {
		n += k
	}
	c.mu.Unlock()
	if n > 3*questionBurst {
		t.Errorf("origins were asked %d times", n)
	}
	// Another source is not in the way.
	m := c.push("a layer")
	resp, _ := from{h, "10.0.0.1"}.post(t, announce.Peer{ID: idOf(2)}, announce.BlobState{Digest: m.Digest, Left: -1, NeedMetainfo: true})
	if len(resp.Blobs) != 1 || len(resp.Blobs[0].Metainfo) == 0 {
		t.Errorf("an honest question: %+v", resp)
	}
}

// TestGreedySourceMakesRoom: where all places are taken, the source that took most of them gives way.
func TestGreedySourceMakesRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const pairs, swarm, peers = 2000, 100, 300
		s := newStore(time.Minute, 30, bounded(func(b *bounds) { b.pairs, b.swarm, b.peers = pairs, swarm, peers }))
		states := make([]announce.BlobState, 500)
		for i := range states {
			states[i] = announce.BlobState{Digest: digest.FromString(fmt.Sprint(i)), Size: 1}
		}
		greedy := callerAt(netip.MustParseAddr("10.66.66.66")).source
		evil := func(i int) identity {
			who := nobody(100_000 + i)
			who.source = greedy
			return who
		}
		honest := func(i int) {
			t.Helper()
			if o := s.register(nobody(i), append([]announce.BlobState{seeding()}, states[:3]...)); o.refused > 0 {
				t.Errorf("honest peer %d: %d refused, %s", i, o.refused, o.why)
			}
		}
		for i := range 40 {
			s.register(evil(i), states)
			time.Sleep(time.Second / 2)
		}
		for i := range 20 {
			honest(i)
			time.Sleep(time.Second / 2)
		}
		for i := range 400 { // as many peers as there may be, all in one swarm
			s.register(evil(1000+i), []announce.BlobState{seeding()})
			time.Sleep(time.Second / 20)
		}
		for i := range 20 {
			honest(20 + i)
			time.Sleep(2 * time.Second)
		}
		given := map[announce.PeerID]bool{}
		for i := range 200 {
			for _, id := range ids(s.handout(theBlob, asking{id: nobody(50_000 + i).id}, 40)) {
				given[id] = true
			}
		}
		for i := range 40 {
			if !given[nobody(i).id] {
				t.Errorf("honest peer %d is given to nobody", i)
			}
		}
		if len(s.peers) > peers*5/4 || s.pairs+s.dead > pairs*5/4 {
			t.Errorf("%d peers, %d pairs and %d of evicted ones are kept", len(s.peers), s.pairs, s.dead)
		}
		time.Sleep(4 * time.Minute)
		s.sweep()
		if swarms, peers, pairs := s.counts(); swarms+peers+pairs+s.dead+s.goners+len(s.sources)+s.waits+len(s.byAddr) != 0 {
			t.Errorf("left of nothing: %d swarms, %d peers, %d pairs, %d dead, %d gone, %d sources", swarms, peers, pairs, s.dead, s.goners, len(s.sources))
		}
	})
}

// TestUnconfirmedAreFound: while origins can't be asked, peers of what nobody has confirmed find each other; once they
// answer, what they don't know goes, and what they know stays.
func TestUnconfirmedAreFound(t *testing.T) {
	c, h := suspicious(t, nil)
	c.mu.Lock()
	c.err = fmt.Errorf("down")
	c.mu.Unlock()
	m, unknown := metainfoOf(t, "a layer"), digest.FromString("nowhere")
	from{h, "10.0.0.1"}.post(t, announce.Peer{ID: idOf(1), Addr: []string{"10.0.0.1:16062"}}, announce.BlobState{Digest: m.Digest, Size: 7}, announce.BlobState{Digest: unknown})
	for _, d := range []digest.Digest{m.Digest, unknown} {
		if got := addrsOf(t, h, d); len(got) != 1 {
			t.Errorf("while origins are down: %v", got)
		}
	}
	c.push("a layer")
	c.mu.Lock()
	c.err = nil
	c.mu.Unlock()
	c.store.mu.Lock()
	for _, w := range c.store.swarms {
		if w.waiting != nil {
			w.waiting.ask = 0 // now, and not after askAgain
		}
	}
	c.store.mu.Unlock()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		c.store.mu.Lock()
		waits, gone := c.store.waits, c.store.swarms[unknown] == nil
		c.store.mu.Unlock()
		if waits == 0 && gone {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d wait, unknown gone: %v", waits, gone)
		}
	}
	if got := addrsOf(t, h, m.Digest); len(got) != 1 {
		t.Errorf("a confirmed blob: %v", got)
	}
	if resp, _ := (from{h, "10.0.0.1"}).post(t, announce.Peer{ID: idOf(1)}, announce.BlobState{Digest: unknown}); resp.Warning != whyUnknown {
		t.Errorf("warning %q", resp.Warning)
	}
	// It is pushed after all: the first who asks for its metainfo is kept at once.
	c.mu.Lock()
	late := metainfoOf(t, "nowhere")
	c.blobs[unknown] = late
	c.mu.Unlock()
	from{h, "10.0.0.3"}.post(t, announce.Peer{ID: idOf(3), Addr: []string{"10.0.0.3:16062"}}, announce.BlobState{Digest: unknown, Left: -1, Want: true, NeedMetainfo: true})
	if got := addrsOf(t, h, unknown); !slices.Equal(got, []string{"10.0.0.3:16062"}) {
		t.Errorf("pushed after all: %v", got)
	}
}

// FuzzAnnounce: whatever a node announces, others are given no address but the one that it announces from.
func FuzzAnnounce(f *testing.F) {
	c, h := suspicious(f, nil)
	d := c.push("a layer").Digest
	seed := func(addr ...string) {
		b, err := json.Marshal(announce.Request{
			Version: announce.Version, Peer: announce.Peer{ID: idOf(1), Addr: addr, Key: "k"}, Blobs: []announce.BlobState{{Digest: d, Size: 7}},
		})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	seed("10.0.0.1:16062")
	seed("10.0.0.66:16062", "[2001:db8::1]:16062")
	seed("169.254.169.254:80")
	seed("127.0.0.1:16062")
	f.Fuzz(func(t *testing.T, body []byte) {
		r := httptest.NewRequest(http.MethodPost, "/announce", bytes.NewReader(body))
		r.RemoteAddr = "10.0.0.1:40000"
		h.ServeHTTP(httptest.NewRecorder(), r)
		for _, a := range addrsOf(t, h, d) {
			ap := netip.MustParseAddrPort(a)
			if ap.Addr() != netip.MustParseAddr("10.0.0.1") || ap.Port() < privileged {
				t.Fatalf("others are given %s", a)
			}
		}
	})
}
