package announce

import (
	"net/netip"
	"testing"
	"time"

	"github.com/anacrolix/torrent/bencode"
)

// FuzzReply has any BitTorrent client read what a tracker answers: as many peers of each family as there are, whatever
// their addresses.
func FuzzReply(f *testing.F) {
	f.Add([]byte{10, 0, 0, 1}, uint16(6881), "-KN0001-abcdefghijkl", int64(10), 3, 4)
	f.Add([]byte("0123456789abcdef"), uint16(0), "", int64(-1), -1, 0)
	f.Add([]byte("\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\x0a\x00\x00\x01"), uint16(1), "x", int64(1<<62), 0, 1<<40)
	f.Fuzz(func(t *testing.T, ip []byte, port uint16, id string, interval int64, complete, incomplete int) {
		p := ReplyPeer{}
		if a, ok := netip.AddrFromSlice(ip); ok {
			p.Addr = netip.AddrPortFrom(a, port)
		}
		copy(p.ID[:], id)
		r := Reply{Interval: time.Duration(interval), Complete: complete, Incomplete: incomplete, Peers: []ReplyPeer{p, p}}
		var compact struct {
			Complete   int    `bencode:"complete"`
			Incomplete int    `bencode:"incomplete"`
			Interval   int64  `bencode:"interval"`
			Peers      []byte `bencode:"peers"`
			Peers6     []byte `bencode:"peers6"`
		}
		if err := bencode.Unmarshal(r.Compact(), &compact); err != nil {
			t.Fatalf("%q: %v", r.Compact(), err)
		}
		v4, v6 := 0, 0
		if a := p.Addr.Addr().Unmap(); a.Is4() {
			v4 = 2 * 6
		} else if a.Is6() {
			v6 = 2 * 18
		}
		if compact.Complete != complete || compact.Incomplete != incomplete || compact.Interval < 1 || len(compact.Peers) != v4 || len(compact.Peers6) != v6 {
			t.Fatalf("%q is %+v", r.Compact(), compact)
		}
		if !p.Addr.IsValid() {
			return // never kept
		}
		var long struct {
			Peers []struct {
				IP   string `bencode:"ip"`
				ID   string `bencode:"peer id"`
				Port uint16 `bencode:"port"`
			} `bencode:"peers"`
		}
		if err := bencode.Unmarshal(r.Dictionaries(), &long); err != nil || len(long.Peers) != 2 {
			t.Fatalf("%q: %+v, %v", r.Dictionaries(), long, err)
		}
		if a, err := netip.ParseAddr(long.Peers[1].IP); err != nil || a != p.Addr.Addr().Unmap() || long.Peers[1].Port != port {
			t.Fatalf("%q: %+v, %v", r.Dictionaries(), long, err)
		}
	})
}
