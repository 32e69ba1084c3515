package tracker

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/anacrolix/torrent/metainfo"
	"github.com/opencontainers/go-digest"

	"kraken/proto/announce"
	"kraken/proto/registry"
	"kraken/proto/ring"
)

// TestStock pins the bytes that a client reads.
func TestStock(t *testing.T) {
	c := newCluster(t, nil)
	m := c.push("a layer")
	const id1, id2 = "-qB4650-000000000001", "-qB4650-000000000002"
	if got := c.stockly(m.InfoHash(), id1, "&port=6881&left=7"); !strings.HasPrefix(got, "d14:failure reason") {
		t.Errorf("a swarm that nobody has heard of: %q", got)
	}
	if status, _, _ := c.get("/blobs/" + m.Digest.String() + "/torrent"); status != 200 {
		t.Fatalf("torrent: %d", status)
	}
	// The owners, best first, then the others.
	origins := func() (compact, list string) {
		for _, id := range ring.New([]string{"origin-01", "origin-02", "origin-03"}, 2).Owners(m.Digest) {
			port := 16040 + int(id[len(id)-1]-'0')
			compact += "\x7f\x00\x00\x01" + string([]byte{byte(port >> 8), byte(port)})
			list += fmt.Sprintf("d2:ip9:127.0.0.14:porti%dee", port)
		}
		return compact, list
	}
	compact, list := origins()
	if got, want := c.stockly(m.InfoHash(), id1, "&port=6881&left=7&event=started"), "d8:completei2e10:incompletei1e8:intervali10e5:peers12:"+compact+"e"; got != want {
		t.Errorf("the first:\ngot  %q\nwant %q", got, want)
	}
	if got, want := c.stockly(m.InfoHash(), id2, "&port=6882&left=7&compact=0"), "d8:completei2e10:incompletei2e8:intervali10e5:peersl"+list+
		"d2:ip9:127.0.0.17:peer id20:"+id1+"4:porti6881eeee"; got != want {
		t.Errorf("the second:\ngot  %q\nwant %q", got, want)
	}
	if got, want := c.stockly(m.InfoHash(), id2, "&port=6882&left=0&event=completed"), "d8:completei3e10:incompletei1e8:intervali10e5:peers6:\x7f\x00\x00\x01\x1a\xe1e"; got != want {
		t.Errorf("a seed:\ngot  %q\nwant %q", got, want)
	}
	if got, want := c.stockly(m.InfoHash(), id1, "&port=6881&left=7&event=stopped"), "d8:completei3e10:incompletei0e8:intervali10e5:peers0:e"; got != want {
		t.Errorf("it stops:\ngot  %q\nwant %q", got, want)
	}
	if got := c.stockly(m.InfoHash(), id1, "&port=6881&left=7&numwant=1"); !strings.Contains(got, "5:peers6:") {
		t.Errorf("one was asked for: %q", got)
	}
	// Agents and stock clients are in one swarm.
	a := c.announce(7, announce.BlobState{Digest: m.Digest, Left: -1, Want: true}).Blobs[0]
	if len(a.Peers) != 2 {
		t.Errorf("an agent is given %+v", a.Peers)
	}
	if got := c.stockly(m.InfoHash(), id1, "&port=6881&left=7"); !strings.Contains(got, "\x0a\x00\x00\x07\x3e\xbe") {
		t.Errorf("a stock client is not given the agent: %q", got)
	}
}

func TestStockIP(t *testing.T) {
	for _, trusted := range []bool{false, true} {
		c := newCluster(t, func(cfg *Config) { cfg.TrustAnnouncedIP = trusted })
		m := c.push("a layer")
		c.get("/blobs/" + m.Digest.String() + "/torrent")
		for i, ip := range []string{"2001:db8::9", "224.0.0.1", "0.0.0.0"} {
			c.stockly(m.InfoHash(), fmt.Sprintf("-XX0000-%012d", i), "&port=6889&left=1&ip="+url.QueryEscape(ip))
		}
		c.stockly(m.InfoHash(), "-XX0000-nolistener00", "&port=0&left=1")
		var got []string
		for _, p := range c.announce(1, announce.BlobState{Digest: m.Digest, Left: -1, Want: true}).Blobs[0].Peers {
			got = append(got, p.Addr...)
		}
		want := []string{"127.0.0.1:6889"} // all three said one address and port: the last one has it
		if trusted {
			want = []string{"[2001:db8::9]:6889"}
		}
		if !slices.Equal(got, want) {
			t.Errorf("trusted %v: peers %v, want %v", trusted, got, want)
		}
	}
}

func TestTorrent(t *testing.T) {
	c := newCluster(t, nil)
	m, empty := c.push("a layer"), c.push("")
	status, header, body := c.get("/blobs/" + m.Digest.String() + "/torrent")
	if status != 200 || header.Get("Content-Type") != "application/x-bittorrent" {
		t.Fatalf("%d %v %s", status, header, body)
	}
	mi, err := metainfo.Load(strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if mi.HashInfoBytes() != [20]byte(m.InfoHash()) || mi.Announce != c.url+"/announce" {
		t.Errorf("info-hash %s, announce %s", mi.HashInfoBytes(), mi.Announce)
	}
	if len(mi.UrlList) != 2 || !strings.HasSuffix(mi.UrlList[0], "/v2/kraken/blobs/"+m.Digest.String()) || !strings.HasPrefix(mi.UrlList[0], "http://127.0.0.1:") {
		t.Errorf("url-list %v", mi.UrlList)
	}
	for path, want := range map[string]struct {
		status int
		code   string
	}{
		"/blobs/" + strings.Replace(m.Digest.String(), ":", "%3A", 1) + "/torrent": {200, ""},
		"/blobs/" + theBlob.String() + "/torrent":                                  {404, "BLOB_UNKNOWN"},
		"/blobs/" + empty.Digest.String() + "/torrent":                             {404, "NOT_FOUND"},
		"/blobs/sha256:abc/torrent":                                                {400, "DIGEST_INVALID"},
		"/blobs/%2e%2e%2fetc/torrent":                                              {400, "DIGEST_INVALID"},
		"/blobs/torrent":                                                           {404, "NOT_FOUND"},
	} {
		status, _, body := c.get(path)
		if status != want.status || (want.code != "" && !strings.Contains(body, `{"errors":[{"code":"`+want.code+`"`)) {
			t.Errorf("GET %s: %d %s, want %+v", path, status, body, want)
		}
	}
	c.mu.Lock()
	c.err = &registry.RetryError{Err: registry.ErrUnavailable, After: time.Second}
	c.mu.Unlock()
	status, header, body = c.get("/blobs/" + digest.FromString("never asked").String() + "/torrent")
	if status != 503 || header.Get("Retry-After") == "" || !strings.Contains(body, "UNAVAILABLE") {
		t.Errorf("origins can't say: %d %s", status, body)
	}
}

func TestTorrentAdvertised(t *testing.T) {
	c := newCluster(t, func(cfg *Config) { cfg.Server.Advertise = "tracker.example:80" })
	_, _, body := c.get("/blobs/" + c.push("a layer").Digest.String() + "/torrent")
	if !strings.HasPrefix(body, "d8:announce34:http://tracker.example:80/announce4:info") {
		t.Errorf("%.80q", body)
	}
}

// TestStockOff: in production nothing is told to who may not join.
func TestStockOff(t *testing.T) {
	c := newCluster(t, func(cfg *Config) { cfg.StockPeers = false })
	m := c.push("a layer")
	c.announce(1, announce.BlobState{Digest: m.Digest, Want: true, NeedMetainfo: true})
	if status, _, body := c.get("/blobs/" + m.Digest.String() + "/torrent"); status != 404 || !strings.Contains(body, `"errors"`) {
		t.Errorf("torrent: %d %s", status, body)
	}
	if got := c.stockly(m.InfoHash(), "-qB4650-000000000001", "&port=6881&left=7"); !strings.HasPrefix(got, "d14:failure reason") {
		t.Errorf("announce: %q", got)
	}
}
