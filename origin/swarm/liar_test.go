package swarm

import (
	"testing"
	"time"
)

func TestLiarAmongThreeSeeds(t *testing.T) {
	b := randomBytes(30, 16<<20)
	one, two := newNode(t, nil), newNode(t, nil)
	m := one.seed(b)
	two.seed(b)
	liar := newSeeder(t, m, newID(peerIDPrefix), lies(m, b))
	n := newNode(t, nil)
	st := n.fetch(m, nil, liar.peer, one.peer(), two.peer()).finish()
	n.has(b)
	n.mustHaveBanned(t, liar)
	if st.PiecesWasted < 1 || st.PiecesWasted > 2 {
		t.Errorf("%d pieces were wasted, want 1 or 2", st.PiecesWasted)
	}
}

func TestLiarIsTheOnlyPeer(t *testing.T) {
	b := randomBytes(31, 8<<20)
	m := metainfoOf(t, b)
	liar := newSeeder(t, m, newID(peerIDPrefix), lies(m, b))
	n := newNode(t, func(c *Config) { c.StallTimeout = 300 * time.Millisecond })
	d := n.fetch(m, nil, liar.peer)
	eventually(t, "the liar is banned", func() bool { return len(n.Bans()) > 0 })
	d.AddSource(newLeaseServer(b))
	st := d.finish()
	n.has(b)
	n.mustHaveBanned(t, liar)
	if st.PiecesWasted > 2 || st.BytesFromPeers != 0 {
		t.Errorf("stats %+v, want at most 2 pieces wasted and nothing from peers", st)
	}
	if _, conns := liar.counts(); conns != 1 {
		t.Errorf("the liar was connected %d times, want once", conns)
	}
}

// mustHaveBanned checks that the liar and nobody else is banned, although all have one IP address.
func (n *node) mustHaveBanned(t *testing.T, liar *seeder) {
	t.Helper()
	bans := n.Bans()
	if len(bans) != 1 || bans[0].ID != liar.peer.ID || bans[0].Addr != liar.peer.Addr || bans[0].Reason == "" || !bans[0].Until.After(time.Now()) {
		t.Errorf("bans %+v, want %+v alone", bans, liar.peer)
	}
	if ips := n.client.BadPeerIPs(); len(ips) != 0 {
		t.Errorf("the library has banned %v", ips)
	}
}

func TestBannedPeerIsRefusedByIDWhenItDials(t *testing.T) {
	b := randomBytes(32, 1<<20)
	n := newNode(t, nil)
	m := n.seed(b)
	id := newID(peerIDPrefix)
	n.bans.add(id, n.Addr(), "test")
	s, err := speakTo(t, n.Addr(), id, m.InfoHash())
	if err == nil && !s.hangsUp() {
		t.Error("a banned peer was let in")
	}
	s, err = speakTo(t, n.Addr(), newID(peerIDPrefix), m.InfoHash())
	if err != nil {
		t.Fatalf("an honest peer from the same IP address was refused: %v", err)
	}
	if _, err := s.hear(); err != nil {
		t.Errorf("an honest peer from the same IP address was refused: %v", err)
	}
}

func TestBansEnd(t *testing.T) {
	n := newNode(t, func(c *Config) { c.BanTime = 20 * time.Millisecond })
	id := newID(peerIDPrefix)
	n.bans.add(id, n.Addr(), "test")
	if !n.bans.has(id, n.Addr()) {
		t.Error("not banned")
	}
	eventually(t, "the ban ends", func() bool { return !n.bans.has(id, n.Addr()) && len(n.Bans()) == 0 })
}

// A piece of several blocks that came from several peers does not tell who lied. Comparing the blocks with the right
// piece does.
func TestLiarAmongSeedsOfPiecesOfSeveralBlocks(t *testing.T) {
	if testing.Short() {
		t.Skip("moves 240 MiB")
	}
	b := randomBytes(33, 240<<20)
	one, two := newNode(t, nil), newNode(t, nil)
	m := one.seed(b)
	two.seed(b)
	liar := newSeeder(t, m, newID(peerIDPrefix), lies(m, b))
	// On a busy machine the race detector makes honest peers stall, and who stalls is let off before the verdict: the
	// liar, too.
	n := newNode(t, func(c *Config) { c.StallTimeout = 20 * time.Second })
	st := n.fetch(m, nil, liar.peer, one.peer(), two.peer()).finish()
	n.has(b)
	n.mustHaveBanned(t, liar)
	t.Logf("%+v", st)
	if st.PiecesWasted > 4 {
		t.Errorf("%d pieces were wasted", st.PiecesWasted)
	}
}
