package announce

import (
	"bytes"
	"errors"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/anacrolix/torrent/bencode"

	"kraken/proto/blob"
)

const (
	// rawHash holds bytes that clients leave bare, percent-encode or get wrong: &, ;, +, space, NUL and above ASCII.
	rawHash = "&;+ \x00\xff%=abcdefghijkl"
	rawID   = "-qB4650-0123456789ab"
)

func stockQuery() string {
	return "info_hash=" + url.QueryEscape(rawHash) + "&peer_id=" + rawID +
		"&port=6881&uploaded=1&downloaded=2&left=3&event=started&numwant=50&compact=1&key=JG3&supportcrypto=1"
}

func TestParseQuery(t *testing.T) {
	q, err := ParseQuery(stockQuery())
	if err != nil {
		t.Fatal(err)
	}
	want := Query{
		InfoHash: blob.InfoHash([]byte(rawHash)), PeerID: PeerID([]byte(rawID)), Port: 6881,
		Uploaded: 1, Downloaded: 2, Left: 3, Event: EventStarted, NumWant: 50, Compact: true, Key: "JG3",
	}
	if q != want {
		t.Errorf("got  %+v\nwant %+v", q, want)
	}
}

func TestParseQueryDefaults(t *testing.T) {
	q, err := ParseQuery("port=1&peer_id=" + rawID + "&info_hash=;;" + strings.Repeat("a", 18))
	if err != nil {
		t.Fatal(err)
	}
	if q.Left != -1 || q.NumWant != -1 || !q.Compact || q.Event != EventNone || q.IP.IsValid() || string(q.InfoHash[:2]) != ";;" {
		t.Errorf("defaults: %+v", q)
	}
}

func TestParseQueryValues(t *testing.T) {
	for _, c := range []struct {
		add string
		ok  func(Query) bool // nil: refused
	}{
		{"compact=0", func(q Query) bool { return !q.Compact }},
		{"event=paused", func(q Query) bool { return q.Event == EventNone }},
		{"event=", func(q Query) bool { return q.Event == EventNone }},
		{"event=stopped", func(q Query) bool { return q.Event == EventStopped }},
		{"ip=::ffff:10.0.0.9", func(q Query) bool { return q.IP == netip.MustParseAddr("10.0.0.9") }},
		{"ip=a.host.name", func(q Query) bool { return !q.IP.IsValid() }},
		{"numwant=-7", func(q Query) bool { return q.NumWant == -1 }},
		{"left=9223372036854775807", func(q Query) bool { return q.Left == 1<<63-1 }},
		{"unknown=1&unknown=2", func(Query) bool { return true }},
		{"left=9223372036854775808", nil},
		{"left=-1", nil},
		{"uploaded=x", nil},
		{"downloaded=1e3", nil},
		{"numwant=99999999999", nil},
		{"event=finished", nil},
		{"port=7", nil}, // twice
		{"left=1&left=1", nil},
		{"key=%zz", nil},
		{"key=" + strings.Repeat("k", MaxKey+1), nil},
		{"pad=" + strings.Repeat("x", maxQuery), nil},
	} {
		base := "info_hash=" + strings.Repeat("h", 20) + "&peer_id=" + rawID + "&port=6881&"
		q, err := ParseQuery(base + c.add)
		switch {
		case c.ok == nil && !errors.Is(err, ErrInvalid):
			t.Errorf("%.40s: got %v, want ErrInvalid", c.add, err)
		case c.ok != nil && (err != nil || !c.ok(q)):
			t.Errorf("%.40s: %+v, %v", c.add, q, err)
		}
	}
	for _, raw := range []string{
		"", "&&&", "info_hash=" + strings.Repeat("h", 20) + "&peer_id=" + rawID, "peer_id=" + rawID + "&port=1",
		"info_hash=short&peer_id=" + rawID + "&port=1",
		"info_hash=" + strings.Repeat("h", 20) + "&peer_id=" + rawID + "&port=65536",
		"info_hash=" + strings.Repeat("h", 21) + "&peer_id=" + rawID + "&port=1",
	} {
		if _, err := ParseQuery(raw); !errors.Is(err, ErrInvalid) {
			t.Errorf("ParseQuery(%q) = %v, want ErrInvalid", raw, err)
		}
	}
}

func reply() Reply {
	return Reply{Interval: 10500 * time.Millisecond, Complete: 2, Incomplete: 3, Peers: []ReplyPeer{
		{Addr: netip.MustParseAddrPort("10.0.0.1:6881"), ID: PeerID([]byte(rawID))},
		{Addr: netip.MustParseAddrPort("[2001:db8::1]:258")},
		{Addr: netip.MustParseAddrPort("[::ffff:10.0.0.2]:1")},
	}}
}

// TestReplyBytes pins what stock clients read.
func TestReplyBytes(t *testing.T) {
	for name, c := range map[string]struct{ got, want string }{
		"compact": {string(reply().Compact()), "d8:completei2e10:incompletei3e8:intervali10e5:peers12:\x0a\x00\x00\x01\x1a\xe1\x0a\x00\x00\x02\x00\x01" +
			"6:peers618:\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x01\x02e"},
		"dictionaries": {string(reply().Dictionaries()), "d8:completei2e10:incompletei3e8:intervali10e5:peersl" +
			"d2:ip8:10.0.0.17:peer id20:" + rawID + "4:porti6881ee" + "d2:ip11:2001:db8::14:porti258ee" + "d2:ip8:10.0.0.24:porti1eeee"},
		"nobody":  {string(Reply{}.Compact()), "d8:completei0e10:incompletei0e8:intervali1e5:peers0:e"},
		"failure": {string(Failure("no such swarm")), "d14:failure reason13:no such swarme"},
	} {
		if c.got != c.want {
			t.Errorf("%s:\ngot  %q\nwant %q", name, c.got, c.want)
		}
		var v any
		if err := bencode.Unmarshal([]byte(c.got), &v); err != nil {
			t.Errorf("%s is not what a client's library reads: %v", name, err)
			continue
		}
		again, err := bencode.Marshal(v)
		if err != nil || !bytes.Equal(again, []byte(c.got)) {
			t.Errorf("%s is not canonical: %q, %v", name, again, err)
		}
	}
}

func FuzzParseQuery(f *testing.F) {
	f.Add(stockQuery())
	f.Add("port=1&peer_id=" + rawID + "&info_hash=;;" + strings.Repeat("a", 18))
	f.Add("info_hash=%00&left=-1&&=&ip=::1%25eth0&port=65536")
	f.Fuzz(func(t *testing.T, raw string) {
		q, err := ParseQuery(raw)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("%v is no ErrInvalid", err)
			}
			return
		}
		if q.Left < -1 || q.Uploaded < 0 || q.Downloaded < 0 || q.NumWant < -1 || q.IP.Zone() != "" || q.IP.Is4In6() {
			t.Fatalf("out of bounds: %+v", q)
		}
		switch q.Event {
		case EventNone, EventStarted, EventCompleted, EventStopped:
		default:
			t.Fatalf("event %q", q.Event)
		}
	})
}
