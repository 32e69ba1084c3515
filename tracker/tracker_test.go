package tracker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anacrolix/torrent/metainfo"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"kraken/proto/announce"
	"kraken/proto/blob"
	"kraken/proto/config"
	"kraken/proto/registry"
	"kraken/proto/ring"
	"kraken/tracker/dashboard"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// cluster is a running tracker over origins that serve nothing but metainfo.
type cluster struct {
	*Tracker
	t       testing.TB
	url     string
	origins []*httptest.Server
	cfg     Config
	cancel  context.CancelFunc
	done    chan error

	mu    sync.Mutex
	blobs map[digest.Digest]*blob.Metainfo
	asked map[string]int // "repository digest"
	err   error
	hang  chan struct{} // when not nil, origins answer nothing until it is closed
}

func newCluster(t testing.TB, change func(*Config)) *cluster {
	t.Helper()
	c := &cluster{t: t, blobs: map[digest.Digest]*blob.Metainfo{}, asked: map[string]int{}}
	c.cfg.Server.Listen, c.cfg.Admin.Listen = "127.0.0.1:0", "127.0.0.1:0"
	c.cfg.StockPeers = true
	for i := range 3 {
		srv := httptest.NewServer(registry.Server{Extension: c.extension, Log: slog.New(slog.DiscardHandler)}.Handler())
		t.Cleanup(srv.Close)
		c.origins = append(c.origins, srv)
		c.cfg.Origins = append(c.cfg.Origins, ring.Member{ID: fmt.Sprintf("origin-%02d", i+1), URL: srv.URL, Peer: fmt.Sprintf("127.0.0.1:%d", 16041+i)})
	}
	if change != nil {
		change(&c.cfg)
	}
	c.start()
	t.Cleanup(c.stop)
	return c
}

func (c *cluster) start() {
	c.t.Helper()
	var err error
	if c.Tracker, err = New(c.cfg, Deps{Log: slog.New(slog.DiscardHandler), Registry: prometheus.NewRegistry()}); err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	c.cancel, c.done, c.url = cancel, make(chan error, 1), "http://"+c.Addr()
	go func() { c.done <- c.Run(ctx) }()
}

func (c *cluster) stop() {
	c.t.Helper()
	if c.cancel == nil {
		return
	}
	http.DefaultClient.CloseIdleConnections()
	c.cancel()
	c.cancel = nil
	if err := <-c.done; err != nil {
		c.t.Error(err)
	}
}

func (c *cluster) extension(w http.ResponseWriter, r *http.Request, x registry.ExtensionPath) error {
	c.mu.Lock()
	d := digest.Digest(x.Key)
	c.asked[x.Repository+" "+x.Key]++
	m, err, hang := c.blobs[d], c.err, c.hang
	c.mu.Unlock()
	if hang != nil {
		select {
		case <-hang:
		case <-r.Context().Done():
		}
	}
	if err != nil {
		return err
	}
	if m == nil || x.Resource != "metainfo" {
		return fmt.Errorf("%w: %s", registry.ErrBlobUnknown, d)
	}
	w.Header().Set("Content-Type", "application/x-bittorrent")
	_, err = w.Write(m.Marshal())
	return err
}

// push makes the origins hold a blob.
func (c *cluster) push(content string) *blob.Metainfo {
	m := metainfoOf(c.t, content)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.blobs[m.Digest] = m
	return m
}

func (c *cluster) get(path string) (int, http.Header, string) {
	c.t.Helper()
	resp, err := http.Get(c.url + path)
	return read(c.t, resp, err)
}

func read(t testing.TB, resp *http.Response, err error) (int, http.Header, string) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, resp.Header, string(b)
}

// announce is what agent i says.
func (c *cluster) announce(i int, states ...announce.BlobState) announce.Response {
	c.t.Helper()
	who := nobody(i)
	resp, err := announce.NewClient(c.url, http.DefaultClient).Announce(context.Background(), announce.Request{
		Version: announce.Version, Blobs: states,
		Peer: announce.Peer{ID: who.id.String(), Addr: []string{who.addrs[0].String()}, Node: who.node},
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return resp
}

// stockly is what a BitTorrent client says; it comes from the loopback.
func (c *cluster) stockly(h blob.InfoHash, id string, more string) string {
	c.t.Helper()
	status, header, body := c.get("/announce?info_hash=" + url.QueryEscape(string(h[:])) + "&peer_id=" + id + more)
	if status != 200 || !strings.HasPrefix(header.Get("Content-Type"), "text/plain") {
		c.t.Errorf("announce: %d %s", status, header.Get("Content-Type"))
	}
	return body
}

func TestBatched(t *testing.T) {
	c := newCluster(t, nil)
	m := c.push("a layer")
	pull := announce.BlobState{Digest: m.Digest, Repository: "library/app", Event: announce.EventStarted, Left: -1, Want: true, NeedMetainfo: true}

	resp := c.announce(1, pull)
	if resp.Version != announce.Version || resp.Interval != 10*time.Second || len(resp.Blobs) != 1 {
		t.Fatalf("%+v", resp)
	}
	a := resp.Blobs[0]
	if a.Digest != m.Digest || !bytes.Equal(a.Metainfo, m.Marshal()) || a.Error != "" || len(a.Peers) != 0 {
		t.Errorf("first answer: %+v", a)
	}
	owners := ring.New([]string{"origin-01", "origin-02", "origin-03"}, 2).Owners(m.Digest)
	var got []string
	for _, o := range a.Origins {
		got = append(got, o.ID)
		i := slices.IndexFunc(c.cfg.Origins, func(m ring.Member) bool { return m.ID == o.ID })
		if o.URL != c.cfg.Origins[i].URL || o.Peer != c.cfg.Origins[i].Peer {
			t.Errorf("origin %+v, want %+v", o, c.cfg.Origins[i])
		}
	}
	if !slices.Equal(got, owners) {
		t.Errorf("origins %v, want %v", got, owners)
	}
	if c.asked["library/app "+m.Digest.String()] != 1 {
		t.Errorf("origins were asked %v", c.asked)
	}

	c.announce(2, announce.BlobState{Digest: m.Digest, Size: m.Size})
	pull.Event, pull.NeedMetainfo = announce.EventNone, false
	a = c.announce(3, pull, pull).Blobs[0] // twice in one request: one answer
	if len(a.Metainfo) != 0 {
		t.Error("metainfo that was not asked for")
	}
	want := map[string]bool{nobody(1).id.String(): false, nobody(2).id.String(): true}
	have := map[string]bool{}
	for _, p := range a.Peers {
		have[p.ID] = p.Complete
		if len(p.Addr) != 1 {
			t.Errorf("addresses %v", p.Addr)
		}
	}
	if !maps.Equal(have, want) {
		t.Errorf("peers %v, want %v", have, want)
	}
	if r := c.announce(3, announce.BlobState{Digest: m.Digest, Left: -1}); len(r.Blobs) != 0 {
		t.Errorf("an answer that was not asked for: %+v", r.Blobs)
	}
	if r := c.announce(3, announce.BlobState{Digest: m.Digest, Left: -1, NeedMetainfo: true}); len(r.Blobs[0].Peers)+len(r.Blobs[0].Origins) != 0 || len(r.Blobs[0].Metainfo) == 0 {
		t.Errorf("metainfo alone was asked for: %+v", r.Blobs[0])
	}
	c.announce(2, announce.BlobState{Digest: m.Digest, Event: announce.EventStopped, Want: true})
	if a := c.announce(3, pull).Blobs[0]; len(a.Peers) != 1 || a.Peers[0].Complete {
		t.Errorf("after one stopped: %+v", a.Peers)
	}
}

// TestOriginsHang: peers and origins are answered in time, the metainfo later.
func TestOriginsHang(t *testing.T) {
	c := newCluster(t, nil)
	m := c.push("a layer")
	c.hang = make(chan struct{})
	pull := announce.BlobState{Digest: m.Digest, Left: -1, Want: true, NeedMetainfo: true}
	c.announce(1, announce.BlobState{Digest: m.Digest})
	began := time.Now()
	a := c.announce(2, pull).Blobs[0]
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %s", took)
	}
	if a.Metainfo != nil || a.Error == "" || len(a.Peers) != 1 || len(a.Origins) != 2 {
		t.Errorf("%+v", a)
	}
	close(c.hang)
	for deadline := time.Now().Add(10 * time.Second); len(a.Metainfo) == 0; a = c.announce(2, pull).Blobs[0] {
		if time.Now().After(deadline) {
			t.Fatalf("no metainfo: %+v", a)
		}
	}
}

func TestBatchedUnknownBlob(t *testing.T) {
	c := newCluster(t, nil)
	known := c.push("a layer")
	resp := c.announce(1,
		announce.BlobState{Digest: theBlob, Left: -1, Want: true, NeedMetainfo: true},
		announce.BlobState{Digest: known.Digest, Left: -1, Want: true, NeedMetainfo: true})
	if len(resp.Blobs) != 2 || !strings.Contains(resp.Blobs[0].Error, "unknown") || resp.Blobs[1].Error != "" || len(resp.Blobs[1].Metainfo) == 0 {
		t.Errorf("%+v", resp)
	}
}

// TestAnswerIsBounded: an answer has no room for the metainfo of many huge blobs, and says so; each can be had.
func TestAnswerIsBounded(t *testing.T) {
	c := newCluster(t, nil)
	var asks []announce.BlobState
	for i := range 3 {
		const pieces = maxAnswerMetainfo/20 + 1 // more than there is room for: the first is given all the same
		m, err := blob.NewMetainfo(digest.FromString(fmt.Sprint(i)), pieces*blob.MaxPieceLength, make([]byte, pieces*20))
		if err != nil {
			t.Fatal(err)
		}
		c.metainfos.mu.Lock()
		c.metainfos.keep(question{"r", m.Digest}, m, nil)
		c.metainfos.mu.Unlock()
		asks = append(asks, announce.BlobState{Digest: m.Digest, Left: -1, NeedMetainfo: true})
	}
	who := announce.Peer{ID: nobody(1).id.String()}
	for range asks {
		resp, err := c.batched(t.Context(), &announce.Request{Version: 1, Peer: who, Blobs: asks})
		if err != nil {
			t.Fatal(err)
		}
		for i, b := range resp.Blobs {
			if (i == 0) != (len(b.Metainfo) > 0) || (i == 0) != (b.Error == "") {
				t.Errorf("blob %d of %d: %d bytes, %q", i, len(asks), len(b.Metainfo), b.Error)
			}
		}
		asks = asks[1:]
	}
}

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
			c.stockly(m.InfoHash(), fmt.Sprintf("-XX0000-%012d", i), "&port=9&left=1&ip="+url.QueryEscape(ip))
		}
		c.stockly(m.InfoHash(), "-XX0000-nolistener00", "&port=0&left=1")
		var got []string
		for _, p := range c.announce(1, announce.BlobState{Digest: m.Digest, Left: -1, Want: true}).Blobs[0].Peers {
			got = append(got, p.Addr...)
		}
		want := []string{"127.0.0.1:9"} // all three said one address and port: the last one has it
		if trusted {
			want = []string{"[2001:db8::9]:9"}
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

// TestAbuse: what is too much or makes no sense is refused with its status, and changes nothing.
func TestAbuse(t *testing.T) {
	c := newCluster(t, nil)
	m := c.push("a layer")
	valid := announce.Request{Version: 1, Peer: announce.Peer{ID: nobody(1).id.String(), Addr: []string{"10.0.0.1:1"}}}
	with := func(change func(*announce.Request)) string {
		r := valid
		change(&r)
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	for name, x := range map[string]struct {
		body   string
		status int
		code   string
	}{
		"no JSON":         {"{", 400, "ANNOUNCE_INVALID"},
		"nothing":         {"", 400, "ANNOUNCE_INVALID"},
		"newer version":   {with(func(r *announce.Request) { r.Version = 2 }), 400, "UNSUPPORTED"},
		"bad digest":      {with(func(r *announce.Request) { r.Blobs = []announce.BlobState{{Digest: "sha256:x"}} }), 400, "ANNOUNCE_INVALID"},
		"bad repository":  {with(func(r *announce.Request) { r.Blobs = []announce.BlobState{{Digest: m.Digest, Repository: "../v2"}} }), 400, "NAME_INVALID"},
		"too many blobs":  {with(func(r *announce.Request) { r.Blobs = slices.Repeat([]announce.BlobState{{Digest: m.Digest}}, 1001) }), 413, "SIZE_INVALID"},
		"too long a body": {strings.Repeat(" ", announce.MaxBody+1), 413, "SIZE_INVALID"},
	} {
		resp, err := http.Post(c.url+"/announce", "application/json", strings.NewReader(x.body))
		status, header, body := read(t, resp, err)
		if status != x.status || !strings.HasPrefix(body, `{"errors":[{"code":"`+x.code+`"`) || header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: %d %s, want %d %s", name, status, body, x.status, x.code)
		}
	}
	for _, query := range []string{"", "info_hash=x", "info_hash=" + strings.Repeat("%00", 20) + "&peer_id=x&port=1", "x=" + strings.Repeat("x", 5000)} {
		if status, _, body := c.get("/announce?" + query); status != 200 || !strings.HasPrefix(body, "d14:failure reason") {
			t.Errorf("announce %.40s: %d %q", query, status, body)
		}
	}
	if status, _, _ := c.get("/announce?x=" + strings.Repeat("x", 100_000)); status != 431 {
		t.Errorf("a query of 100 kB: %d, want 431", status)
	}
	for path, want := range map[string]int{"/nothing/here": 404, "/swarms/x": 404} {
		if status, _, body := c.get(path); status != want || !strings.HasPrefix(body, `{"errors":`) {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
	req, err := http.NewRequest(http.MethodDelete, c.url+"/swarms", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if status, _, body := read(t, resp, err); status != 405 || !strings.Contains(body, "UNSUPPORTED") {
		t.Errorf("DELETE: %d %s", status, body)
	}
	if swarms, peers, _ := c.store.counts(); swarms+peers != 0 {
		t.Errorf("%d swarms and %d peers were made by what was refused", swarms, peers)
	}
}

// TestRestart: a new tracker knows nothing and needs nothing. One announce of each and all is as it was.
func TestRestart(t *testing.T) {
	c := newCluster(t, nil)
	m := c.push("a layer")
	pull := announce.BlobState{Digest: m.Digest, Left: -1, Want: true, NeedMetainfo: true}
	all := func() announce.BlobAnswer {
		for i := range 30 {
			c.announce(i, announce.BlobState{Digest: m.Digest, Size: m.Size, Left: int64(i % 3)})
		}
		return c.announce(99, pull).Blobs[0]
	}
	before := all()
	c.stop()
	c.start()
	if a := c.announce(99, pull).Blobs[0]; len(a.Peers) != 0 || len(a.Metainfo) == 0 || len(a.Origins) != 2 {
		t.Errorf("right after: %+v", a)
	}
	if after := all(); !slices.EqualFunc(before.Peers, after.Peers, func(a, b announce.Peer) bool { return a.ID == b.ID && a.Complete == b.Complete }) {
		t.Error("others are handed out than before")
	}
}

func TestReadiness(t *testing.T) {
	c := newCluster(t, nil)
	for _, base := range []string{c.url, "http://" + c.AdminAddr()} {
		resp, err := http.Get(base + "/readiness")
		if status, _, body := read(t, resp, err); status != 200 || strings.Contains(body, "degraded") {
			t.Errorf("%s: %d %s", base, status, body)
		}
	}
	c.stop()
	for _, o := range c.origins {
		o.Close()
	}
	c.start()
	if status, _, body := c.get("/readiness"); status != 200 || !strings.Contains(body, `"degraded":[{"name":"origin-01"`) {
		t.Errorf("without origins: %d %s", status, body)
	}
	if status, _, _ := c.get("/health"); status != 200 {
		t.Errorf("health: %d", status)
	}
	resp, err := http.Get("http://" + c.AdminAddr() + "/metrics")
	if status, _, body := read(t, resp, err); status != 200 || !strings.Contains(body, "kraken_tracker_swarms 0") || !strings.Contains(body, "kraken_http_requests_total") {
		t.Errorf("metrics: %d %s", status, body)
	}
}

func TestNewRollsBack(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	var cfg Config
	cfg.Origins = []ring.Member{{ID: "o", URL: "http://127.0.0.1:1"}}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg.Server.Listen, cfg.Admin.Listen = free.Addr().String(), taken.Addr().String()
	if err := free.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = New(cfg, Deps{Log: slog.New(slog.DiscardHandler), Registry: prometheus.NewRegistry()})
	if err == nil || !strings.Contains(err.Error(), "admin") {
		t.Fatalf("a taken admin port: %v", err)
	}
	again, err := net.Listen("tcp", cfg.Server.Listen)
	if err != nil {
		t.Fatalf("the main listener was left open: %v", err)
	}
	again.Close()
}

func TestPage(t *testing.T) {
	c := newCluster(t, nil)
	if status, header, body := c.get("/"); status != 200 || !strings.HasPrefix(header.Get("Content-Type"), "text/html") || !strings.Contains(body, "No swarm yet") || !strings.Contains(body, `http-equiv="refresh" content="2"`) {
		t.Errorf("empty: %d %v", status, header)
	}
	m := c.push(strings.Repeat("a layer", 100_000))
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

func TestHosts(t *testing.T) {
	h := newHosts()
	var asked int
	var fail error
	h.lookup = func(_ context.Context, network, host string) ([]netip.Addr, error) {
		asked++
		if host != "origin.example" || network != "ip" {
			t.Errorf("lookup of %s %s", network, host)
		}
		return []netip.Addr{netip.MustParseAddr("::ffff:10.0.0.1"), netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("2001:db8::1")}, fail
	}
	want := []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:7"), netip.MustParseAddrPort("[2001:db8::1]:7")}
	for range 3 {
		if got, err := h.resolve(t.Context(), "origin.example:7"); err != nil || !slices.Equal(got, want) {
			t.Errorf("%v, %v", got, err)
		}
	}
	if asked != 1 {
		t.Errorf("asked %d times", asked)
	}
	fail = errors.New("no such host")
	h.known["origin.example:7"] = resolved{addrs: want} // old
	if got, err := h.resolve(t.Context(), "origin.example:7"); err != nil || !slices.Equal(got, want) {
		t.Errorf("while names can't be resolved: %v, %v", got, err)
	}
	if got, err := h.resolve(t.Context(), "[::ffff:10.0.0.3]:9"); err != nil || !slices.Equal(got, []netip.AddrPort{netip.MustParseAddrPort("10.0.0.3:9")}) {
		t.Errorf("a literal: %v, %v", got, err)
	}
	for _, bad := range []string{"", "origin.example", "origin.example:http", "origin.example:8"} {
		if _, err := h.resolve(t.Context(), bad); err == nil {
			t.Errorf("%q is resolved", bad)
		}
	}
}

func TestConfig(t *testing.T) {
	var sample Config
	if err := config.Load(filepath.Join("..", "deploy", "config", "tracker.yaml"), &sample); err != nil {
		t.Fatal(err)
	}
	var defaults Config
	defaults.Server.Listen, defaults.Origins = "127.0.0.1:16020", sample.Origins
	if err := defaults.Validate(); err != nil {
		t.Fatal(err)
	}
	if sample.Interval != defaults.Interval || sample.PeersPerAnswer != defaults.PeersPerAnswer || sample.MetainfoMemory != defaults.MetainfoMemory || sample.Limits != defaults.Limits || sample.Replicas != defaults.Replicas {
		t.Errorf("the sample says other defaults:\n%+v\n%+v", sample, defaults)
	}
	minimal := "server: {listen: '127.0.0.1:0'}\norigins: [{id: o, url: 'http://o', peer: 'o:1'}]\n"
	for name, c := range map[string]struct{ add, want string }{
		"nothing more":      {"", ""},
		"unknown key":       {"stock_peer: true", "stock_peer"},
		"too short":         {"interval: 10ms", "interval"},
		"too long":          {"interval: 1h", "interval"},
		"too many peers":    {"peers_per_answer: 1000", "peers_per_answer"},
		"negative limit":    {"limits: {pairs: -1}", "limits"},
		"negative replicas": {"replicas: -1", "replicas"},
		"no meaning":        {"trust_announced_ip: true", "trust_announced_ip"},
	} {
		err := config.Decode(name, strings.NewReader(minimal+c.add), new(Config))
		if (c.want == "") != (err == nil) || (err != nil && !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want one that names %q", name, err, c.want)
		}
	}
	for name, text := range map[string]string{
		"server.listen": "origins: [{id: o, url: 'http://o'}]", "origins": "server: {listen: ':0'}",
		"twice": "server: {listen: ':0'}\norigins: [{id: o, url: 'http://o'}, {id: o, url: 'http://p'}]",
		"peer":  "server: {listen: ':0'}\nstock_peers: true\norigins: [{id: o, url: 'http://o'}]",
		"url":   "server: {listen: ':0'}\norigins: [{id: o}]",
	} {
		if err := config.Decode("x", strings.NewReader(text), new(Config)); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

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
