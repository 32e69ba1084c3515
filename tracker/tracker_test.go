package tracker

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"kraken/proto/announce"
	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/ring"
	"kraken/proto/role"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// cluster is a running tracker over origins that serve nothing but metainfo.
type testCluster struct {
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

func newCluster(t testing.TB, change func(*Config)) *testCluster {
	t.Helper()
	c := &testCluster{t: t, blobs: map[digest.Digest]*blob.Metainfo{}, asked: map[string]int{}}
	c.cfg.Server.Listen, c.cfg.Admin.Listen = "127.0.0.1:0", "127.0.0.1:0"
	c.cfg.StockPeers, c.cfg.TrustAnnouncedIP = true, true // so that one test can be many nodes
	for i := range 3 {
		api := registry.Server{Dialect: cluster.Dialect(), Extension: c.extension, Log: slog.New(slog.DiscardHandler)}.Handler()
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if dir, last := path.Split(r.URL.Path); r.Method == http.MethodHead && path.Base(dir) == "blobs" {
				c.stat(w, digest.Digest(last))
				return
			}
			api.ServeHTTP(w, r)
		}))
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

func (c *testCluster) start() {
	c.t.Helper()
	var err error
	if c.Tracker, err = New(c.cfg, role.Deps{Log: slog.New(slog.DiscardHandler), Registry: prometheus.NewRegistry()}); err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	c.cancel, c.done, c.url = cancel, make(chan error, 1), "http://"+c.Addr()
	go func() { c.done <- c.Run(ctx) }()
}

func (c *testCluster) stop() {
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

func (c *testCluster) extension(w http.ResponseWriter, r *http.Request, x registry.ExtensionPath) error {
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

// stat answers HEAD of a blob.
func (c *testCluster) stat(w http.ResponseWriter, d digest.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked["stat "+d.String()]++
	switch m := c.blobs[d]; {
	case c.err != nil:
		w.WriteHeader(http.StatusServiceUnavailable)
	case m == nil:
		w.WriteHeader(http.StatusNotFound)
	default:
		w.Header().Set("Content-Length", strconv.FormatInt(m.Size, 10))
		w.Header().Set("Docker-Content-Digest", d.String())
	}
}

// push makes the origins hold a blob.
func (c *testCluster) push(content string) *blob.Metainfo {
	m := metainfoOf(c.t, content)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.blobs[m.Digest] = m
	return m
}

func (c *testCluster) get(path string) (int, http.Header, string) {
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
func (c *testCluster) announce(i int, states ...announce.BlobState) announce.Response {
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
func (c *testCluster) stockly(h blob.InfoHash, id string, more string) string {
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
		resp, err := c.batched(t.Context(), callerAt(netip.MustParseAddr("127.0.0.1")), &announce.Request{Version: 1, Peer: who, Blobs: asks})
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
