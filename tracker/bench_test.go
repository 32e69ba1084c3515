package tracker

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
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

// BenchmarkAnnounces is what a tracker on one core (GOMAXPROCS=1) takes: batches of 100 blobs from 1,000 agents, as
// agents send them between pulls. It measures the handler alone, and the whole round trip, with the client on the same
// core.
func BenchmarkAnnounces(b *testing.B) {
	const batch, agents = 100, 1000
	c := newCluster(b, nil)
	bodies := make([][]byte, agents)
	for i := range bodies {
		var states []announce.BlobState
		for k := range batch {
			states = append(states, announce.BlobState{
				Digest: digest.FromString(fmt.Sprint(i%10*batch + k)), Repository: "library/debian", Size: 1 << 30, Downloaded: 1 << 30, Uploaded: 1 << 20,
			})
		}
		var err error
		peer := announce.Peer{ID: nobody(i).id.String(), Addr: []string{fmt.Sprintf("10.0.%d.%d:16062", i/250, i%250+1)}, Node: fmt.Sprint("node-", i)}
		if bodies[i], err = json.Marshal(announce.Request{Version: 1, Peer: peer, Blobs: states}); err != nil {
			b.Fatal(err)
		}
	}
	h := c.handler(prometheus.NewRegistry())
	b.Run("handler", func(b *testing.B) {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
		b.ReportAllocs()
		i := 0
		for b.Loop() {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/announce", bytes.NewReader(bodies[i%agents])))
			if w.Code != 200 {
				b.Fatal(w.Body)
			}
			i++
		}
		b.ReportMetric(float64(batch*b.N)/b.Elapsed().Seconds(), "blobs/s")
	})
	b.Run("http", func(b *testing.B) {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
		s := httptest.NewServer(h)
		defer s.Close()
		i := 0
		for b.Loop() {
			resp, err := s.Client().Post(s.URL+"/announce", "application/json", bytes.NewReader(bodies[i%agents]))
			if err != nil {
				b.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != 200 {
				b.Fatal(resp.Status, err)
			}
			resp.Body.Close()
			i++
		}
		b.ReportMetric(float64(batch*b.N)/b.Elapsed().Seconds(), "blobs/s")
	})
}

// BenchmarkFirstAnswer is what a new download waits for: metainfo, 40 peers and the origins, in a swarm of 1,000.
func BenchmarkFirstAnswer(b *testing.B) {
	c := newCluster(b, nil)
	m := c.push("a layer")
	for i := range 1000 {
		c.store.say(b, nobody(i), announce.BlobState{Digest: m.Digest, Left: int64(i % 2), Size: m.Size})
	}
	body, err := json.Marshal(announce.Request{
		Version: 1, Peer: announce.Peer{ID: nobody(5000).id.String(), Addr: []string{"10.0.0.1:16062"}},
		Blobs: []announce.BlobState{{Digest: m.Digest, Left: -1, Event: announce.EventStarted, Want: true, NeedMetainfo: true}},
	})
	if err != nil {
		b.Fatal(err)
	}
	h := c.handler(prometheus.NewRegistry())
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	b.ReportAllocs()
	for b.Loop() {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/announce", bytes.NewReader(body)))
		if w.Code != 200 {
			b.Fatal(w.Body)
		}
	}
}

// BenchmarkPair is the memory of a (peer, blob) pair: 1,000 peers with 100 blobs each, of 1,000.
func BenchmarkPair(b *testing.B) {
	const peers, blobs = 1000, 100
	live := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	digests := make([]digest.Digest, 1000)
	for i := range digests {
		digests[i] = digest.FromString(fmt.Sprint(i))
	}
	var per float64
	for b.Loop() {
		before := live()
		s := newStore(time.Hour, degreeOf(40), wide)
		for i := range peers {
			states := make([]announce.BlobState, blobs)
			for k := range states {
				states[k] = announce.BlobState{Digest: digests[(i*7+k)%len(digests)], Size: 1 << 30}
			}
			s.say(b, nobody(i), states...)
		}
		per = float64(live()-before) / (peers * blobs)
		runtime.KeepAlive(s)
	}
	b.ReportMetric(per, "B/pair")
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
		if h := s.handout(theBlob, asking{id: nobody(i % 10_000).id}, 40); len(h.peers) != 40 && len(h.peers) < 35 {
			b.Fatalf("%d peers", len(h.peers))
		}
		i++
	}
}
