package abuse

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"kraken/proto/announce"

	"github.com/opencontainers/go-digest"
)

// announceAs announces at the tracker, from loopback.
func announceAs(t *testing.T, c *system, peer announce.Peer, states ...announce.BlobState) (announce.Response, int) {
	t.Helper()
	body, err := json.Marshal(announce.Request{Version: announce.Version, Peer: peer, Blobs: states})
	if err != nil {
		t.Fatal(err)
	}
	a := do(t, c.client(t), http.MethodPost, c.Tracker.URL, "/announce", body, "Content-Type", "application/json")
	var out announce.Response
	if a.status == http.StatusOK {
		if err := json.Unmarshal(a.body, &out); err != nil {
			t.Fatal(err)
		}
	}
	return out, a.status
}

func peerID(i int) string { return fmt.Sprintf("%040x", 1<<60+i) }

// TestAnnouncedAddress: nobody is made to dial an address that its announcer does not have.
func TestAnnouncedAddress(t *testing.T) {
	c := shared(t)
	d := c.metainfo(t, "abuse/announced", []byte(strings.Repeat("announced", 100_000))).Digest
	for i, addr := range []string{"192.0.2.66:16062", "169.254.169.254:16062", "[2001:db8::66]:16062", "127.0.0.1:22"} {
		announceAs(t, c, announce.Peer{ID: peerID(i), Addr: []string{addr}}, announce.BlobState{Digest: d, Size: 7})
	}
	resp, status := announceAs(t, c, announce.Peer{ID: peerID(99)}, announce.BlobState{Digest: d, Left: -1, Want: true})
	if status != http.StatusOK || len(resp.Blobs) != 1 {
		t.Fatalf("%d %+v", status, resp)
	}
	for _, p := range resp.Blobs[0].Peers {
		if slices.ContainsFunc(p.Addr, func(a string) bool { return !strings.HasPrefix(a, "127.0.0.1:") || a == "127.0.0.1:22" }) {
			t.Errorf("others are sent to %v", p.Addr)
		}
	}
}

// TestInventedDigests: a flood of digests that don't exist takes little memory, and the page is quick after it.
func TestInventedDigests(t *testing.T) {
	c := shared(t)
	before := c.Tracker.rss(t)
	states := make([]announce.BlobState, announce.MaxBlobs)
	for i := range 150 {
		for k := range states {
			states[k] = announce.BlobState{Digest: digest.NewDigestFromBytes(digest.SHA256, sum(i, k)), Size: 1 << 30}
		}
		if _, status := announceAs(t, c, announce.Peer{ID: peerID(1000 + i)}, states...); status != http.StatusOK {
			t.Fatalf("announce %d: %d", i, status)
		}
	}
	if more := c.Tracker.rss(t) - before; more > 48<<20 {
		t.Errorf("150,000 invented digests took %d MiB", more>>20)
	}
	var page struct {
		Swarms     []any `json:"swarms"`
		SwarmCount int   `json:"swarm_count"`
	}
	a := do(t, c.client(t), http.MethodGet, c.Tracker.URL, "/swarms", nil)
	if err := json.Unmarshal(a.body, &page); err != nil || len(page.Swarms) > 200 || page.SwarmCount > 11_000 {
		t.Errorf("/swarms: %d rows of %d, %v", len(page.Swarms), page.SwarmCount, err)
	}
}

func sum(i, k int) []byte {
	s := sha256.Sum256(fmt.Appendf(nil, "%d %d", i, k))
	return s[:]
}

// TestDoubtedMetainfo: a claim about a blob that an origin does not hold is 404 and starts nothing.
func TestDoubtedMetainfo(t *testing.T) {
	c := shared(t)
	a := do(t, c.client(t), http.MethodDelete, c.Origins[0].URL, "/v2/abuse/_kraken/metainfo/"+digest.FromString("nowhere").String(), nil)
	if a.status != http.StatusNotFound {
		t.Errorf("status %d, want 404", a.status)
	}
}
