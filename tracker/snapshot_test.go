package tracker

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/announce"
	"kraken/tracker/dashboard"
)

func TestPage(t *testing.T) {
	c := newCluster(t, nil)
	if status, header, body := c.get("/"); status != 200 || !strings.HasPrefix(header.Get("Content-Type"), "text/html") || !strings.Contains(body, "No swarm yet") || !strings.Contains(body, `http-equiv="refresh" content="2"`) {
		t.Errorf("empty: %d %v", status, header)
	}
	if _, _, body := c.get("/swarms"); !strings.Contains(body, `"swarms":[],"nodes":[]`) {
		t.Errorf("empty: %s", body)
	}
	m := c.push(strings.Repeat("a layer", 100_000))
	c.push("the blob")
	c.announce(1, announce.BlobState{Digest: m.Digest, Size: m.Size, Left: m.Size / 2, Want: true, NeedMetainfo: true, Uploaded: 5, Downloaded: 6})
	c.announce(2, announce.BlobState{Digest: m.Digest, Size: m.Size})
	c.announce(2, announce.BlobState{Digest: theBlob, Left: -1})
	var got dashboard.Snapshot
	for deadline := time.Now().Add(10 * time.Second); got.SwarmCount < 2; { // the snapshot may be a second old
		_, header, body := c.get("/swarms")
		if err := json.Unmarshal([]byte(body), &got); err != nil || header.Get("Content-Type") != "application/json" {
			t.Fatalf("%v: %s", err, body)
		}
		if time.Now().After(deadline) {
			t.Fatalf("not shown: %s", body)
		}
	}
	if got.NodeCount != 2 || got.Seeds != 1 || got.Leechers != 2 || got.Bytes != m.Size || len(got.Origins) != 3 || got.Interval != 10 {
		t.Errorf("%+v", got)
	}
	i := slices.IndexFunc(got.Swarms, func(w dashboard.Swarm) bool { return w.Digest == m.Digest.String() })
	if w := got.Swarms[i]; w.Seeds != 1 || w.Leechers != 1 || w.Progress != 0.75 || w.Size != m.Size || w.InfoHash != m.InfoHash().String() {
		t.Errorf("swarm %+v", w)
	}
	if n := got.Nodes[0]; n.Name != "agent-01" || n.Fetching != 1 || n.Seeding != 0 || n.Uploaded != 5 || n.Downloaded != 6 || n.Fetches[0].Progress != 0.5 || n.Addr[0] != "10.0.0.1:16062" {
		t.Errorf("node %+v", n)
	}
	if n := got.Nodes[1]; n.Seeding != 1 || n.Fetching != 1 || n.Bytes != m.Size || n.Held[0].Digest != m.Digest.String() {
		t.Errorf("node %+v", n)
	}
	_, _, body := c.get("/")
	for _, want := range []string{m.Digest.String(), m.Digest.Encoded()[:12], "agent-01", "agent-02", "10.0.0.1:16062", "75 %", "684 KiB"} {
		if !strings.Contains(body, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
}

// TestWalksBesideAnnounces: the page and the sweep let announces in between, which change what they walk over.
func TestWalksBesideAnnounces(t *testing.T) {
	const workers, rounds, blobs = 4, 30, 3 * atOnce
	s := newStore(time.Minute, 30, wide)
	states := func(e announce.Event, left int64) []announce.BlobState {
		out := make([]announce.BlobState, blobs)
		for i := range out {
			out[i] = announce.BlobState{Digest: digest.FromString(fmt.Sprint(i)), Size: 100, Left: left, Event: e}
		}
		return out
	}
	const stays = 1_000_000
	s.say(t, nobody(stays), states(announce.EventNone, 0)...)
	stop := make(chan struct{})
	var walks, announcers sync.WaitGroup
	walks.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			s.sweep()
			for _, n := range s.snapshot().Nodes {
				if n.PeerID == nobody(stays).id.String() && n.Seeding != blobs {
					t.Errorf("who stays is shown with %d blobs, want %d", n.Seeding, blobs)
				}
			}
		}
	})
	for w := range workers {
		announcers.Go(func() {
			for i := range rounds {
				who := nobody(w*rounds + i)
				s.say(t, who, states(announce.EventStarted, 1)...)
				s.say(t, who, states(announce.EventCompleted, 0)...)
				s.handout(digest.FromString("1"), asking{id: who.id}, 40)
				s.say(t, who, states(announce.EventStopped, 0)...)
			}
		})
	}
	announcers.Wait()
	close(stop)
	walks.Wait()
	if swarms, peers, pairs := s.counts(); swarms != blobs || peers != workers*rounds+1 || pairs != blobs {
		t.Errorf("%d swarms, %d peers, %d pairs, want %d, %d, %d", swarms, peers, pairs, blobs, workers*rounds+1, blobs)
	}
}

// TestPageStandsStill: what did not change is shown in the same place after every refresh.
func TestPageStandsStill(t *testing.T) {
	s := newStore(time.Minute, 30, wide)
	for i := range 20 {
		for d := range 20 {
			s.say(t, nobody(i), announce.BlobState{Digest: digest.FromString(fmt.Sprint(d)), Size: 9})
		}
	}
	rows := func() (out []string) {
		snap := s.snapshot()
		for _, w := range snap.Swarms {
			out = append(out, w.Digest)
		}
		for _, n := range snap.Nodes {
			for _, h := range n.Held {
				out = append(out, n.Name+h.Digest)
			}
		}
		return out
	}
	first := rows()
	for range 5 {
		if !slices.Equal(rows(), first) {
			t.Fatal("rows moved")
		}
	}
}
