package announce

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// BenchmarkParseRequest is a batch of 100 blobs as a tracker reads it.
func BenchmarkParseRequest(b *testing.B) {
	r := Request{Version: Version, Peer: Peer{ID: fmt.Sprintf("%040x", 1), Addr: []string{"10.0.0.1:16062"}, Node: "node-1"}}
	for i := range 100 {
		r.Blobs = append(r.Blobs, BlobState{Digest: digest.FromString(fmt.Sprint(i)), Repository: "library/debian", Size: 1 << 30, Downloaded: 1 << 30})
	}
	body, err := json.Marshal(r)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseRequest(body); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(100*float64(b.N)/b.Elapsed().Seconds(), "blobs/s")
}

// BenchmarkMarshalResponse is the answer for one blob with metainfo of 400 pieces and 40 peers.
func BenchmarkMarshalResponse(b *testing.B) {
	a := BlobAnswer{Digest: digest.FromString("a"), Metainfo: make([]byte, 400*20)}
	for i := range 40 {
		a.Peers = append(a.Peers, Peer{ID: fmt.Sprintf("%040x", i), Addr: []string{"10.0.0.1:16062"}, Complete: i%2 == 0})
	}
	r := Response{Version: Version, Interval: 10 * time.Second, Blobs: []BlobAnswer{a}}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := json.Marshal(r); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkBEP3 is the announce of a stock client and its compact answer.
func BenchmarkBEP3(b *testing.B) {
	query := "info_hash=%124Vx%9A%BC%DE%F1%23Eg%89%AB%CD%EF%124Vx%9A&peer_id=-qB4500-abcdefghijkl&port=6881&uploaded=0&downloaded=0&left=1000&compact=1&numwant=50&event=started"
	var r Reply
	for i := range 40 {
		r.Peers = append(r.Peers, ReplyPeer{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), 16062)})
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseQuery(query); err != nil {
			b.Fatal(err)
		}
		r.Compact()
	}
}
