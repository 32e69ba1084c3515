package tracker

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/announce"
)

// BenchmarkBatched is one announce of an agent that holds 300 blobs and fetches one, in a cluster of 1,000 such agents.
func BenchmarkBatched(b *testing.B) {
	c := newCluster(b, nil)
	m := c.push("a layer")
	states := make([]announce.BlobState, 300)
	for i := range states {
		states[i] = announce.BlobState{Digest: digest.FromString(fmt.Sprint(i)), Size: 1 << 30}
	}
	for i := range 1000 {
		c.store.say(b, nobody(i), append(states, announce.BlobState{Digest: m.Digest, Left: 1, Size: m.Size})...)
	}
	states = append(states, announce.BlobState{Digest: m.Digest, Left: 1, Want: true, NeedMetainfo: true})
	body, err := json.Marshal(announce.Request{Version: 1, Peer: announce.Peer{ID: nobody(1).id.String(), Addr: []string{"10.0.0.1:16062"}}, Blobs: states})
	if err != nil {
		b.Fatal(err)
	}
	h := c.handler(prometheus.NewRegistry())
	b.ReportAllocs()
	for b.Loop() {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/announce", bytes.NewReader(body)))
		if w.Code != 200 {
			b.Fatal(w.Body)
		}
	}
}

// BenchmarkHandout is the answer alone, in a swarm of 10,000 leechers and as many seeds.
func BenchmarkHandout(b *testing.B) {
	s := newStore(time.Hour, degreeOf(40), wide)
	for i := range 10_000 {
		s.say(b, nobody(i), leeching())
		s.say(b, nobody(10_000+i), seeding())
	}
	i := 0
	for b.Loop() {
		if h := s.handout(theBlob, nobody(i%10_000).id, 40); len(h.peers) != 40 && len(h.peers) < 35 {
			b.Fatalf("%d peers", len(h.peers))
		}
		i++
	}
}
