package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/announce"
	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/config"
	"kraken/proto/registry"
	"kraken/proto/ring"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// source is an origin that has its blobs in memory, leases whatever an agent lacks, and sends no more bytes than it was
// allowed to.
type source struct {
	*httptest.Server
	blobs      map[digest.Digest][]byte
	infos      map[digest.Digest]*blob.Metainfo
	noMetainfo bool

	mu       sync.Mutex
	room     int64         // bytes that may be sent yet
	more     chan struct{} // closed and replaced when there is more
	open     int           // bodies that are being sent
	asked    []cluster.LeaseRequest
	conns    int
	mostConn int // at once
}

// everything is more than any test moves.
const everything = 1 << 40

func newSource(t *testing.T, blobs ...[]byte) *source {
	t.Helper()
	o := &source{blobs: map[digest.Digest][]byte{}, infos: map[digest.Digest]*blob.Metainfo{}, more: make(chan struct{})}
	for _, b := range blobs {
		d := digest.FromBytes(b)
		h := blob.NewPieceHasher(int64(len(b)))
		if _, err := h.Write(b); err != nil {
			t.Fatal(err)
		}
		m, err := h.Sum(d)
		if err != nil {
			t.Fatal(err)
		}
		o.blobs[d], o.infos[d] = b, m
	}
	o.Server = httptest.NewUnstartedServer(registry.Server{Dialect: cluster.Dialect(), Blobs: o, Extension: o.extension}.Handler())
	o.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		o.mu.Lock()
		defer o.mu.Unlock()
		switch s {
		case http.StateNew:
			o.conns++
			o.mostConn = max(o.mostConn, o.conns)
		case http.StateClosed:
			o.conns--
		}
	}
	o.Start()
	t.Cleanup(o.Close)
	return o
}

// allow lets n bytes more be sent.
func (o *source) allow(n int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.room += n
	close(o.more)
	o.more = make(chan struct{})
}

func (o *source) bodies() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.open
}

// requests are the leases that were asked for since the first so many.
func (o *source) requests(since int) []cluster.LeaseRequest {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.asked[min(since, len(o.asked)):])
}

func (o *source) StatBlob(_ context.Context, _ string, d digest.Digest) (v1.Descriptor, error) {
	b, ok := o.blobs[d]
	if !ok {
		return v1.Descriptor{}, registry.ErrBlobUnknown
	}
	return v1.Descriptor{Digest: d, Size: int64(len(b))}, nil
}

func (o *source) OpenBlob(ctx context.Context, _ string, d digest.Digest, _ registry.Range) (*registry.Content, error) {
	b, ok := o.blobs[d]
	if !ok {
		return nil, registry.ErrBlobUnknown
	}
	o.mu.Lock()
	o.open++
	o.mu.Unlock()
	return &registry.Content{Digest: d, Size: int64(len(b)), Body: &metered{bytes.NewReader(b), ctx, o}, Close: func() error {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.open--
		return nil
	}}, nil
}

// metered is a body that is sent as far as it is allowed.
type metered struct {
	*bytes.Reader
	ctx context.Context
	o   *source
}

func (r *metered) Read(b []byte) (int, error) {
	for {
		r.o.mu.Lock()
		n, more := min(int64(len(b)), r.o.room), r.o.more
		r.o.room -= n
		r.o.mu.Unlock()
		if n > 0 {
			return r.Reader.Read(b[:n])
		}
		select {
		case <-more:
		case <-r.ctx.Done():
			return 0, context.Cause(r.ctx)
		}
	}
}

// WriteTo would go around Read.
func (r *metered) WriteTo(w io.Writer) (int64, error) { return io.Copy(w, struct{ io.Reader }{r}) }

func (o *source) extension(w http.ResponseWriter, r *http.Request, x registry.ExtensionPath) error {
	m := o.infos[digest.Digest(x.Key)]
	switch {
	case x.Resource == "metainfo" && (o.noMetainfo || m == nil):
		return registry.ErrBlobUnknown
	case x.Resource == "metainfo":
		_, err := w.Write(m.Marshal())
		return err
	case x.Resource != "lease" || m == nil:
		return registry.ErrUnsupported
	}
	var q cluster.LeaseRequest
	if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
		return err
	}
	have, err := blob.ParseBitmap(m.NumPieces(), q.Have)
	if err != nil {
		return err
	}
	o.mu.Lock()
	o.asked = append(o.asked, q)
	o.mu.Unlock()
	var out cluster.LeaseResponse
	give := func(i int) {
		if len(out.Pieces) < q.Max && !have.Has(i) {
			have.Set(i)
			out.Pieces = append(out.Pieces, i)
		}
	}
	for _, i := range q.Want {
		give(i)
	}
	for i := range m.NumPieces() {
		give(i)
	}
	if len(out.Pieces) < q.Max {
		out.RetryAfter = 20 * time.Millisecond
	}
	return json.NewEncoder(w).Encode(out)
}

// lonely is a tracker that knows no peers, and the metainfo that it was given. It answers once ready is closed, and
// says when it is asked for a blob.
func lonely(t *testing.T, ready <-chan struct{}, infos map[digest.Digest]*blob.Metainfo) (url string, asked <-chan struct{}) {
	t.Helper()
	h := make(chan struct{}, 1)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		req, err := announce.ParseRequest(body)
		if err != nil {
			t.Error(err)
		}
		answer := announce.Response{Version: announce.Version, Interval: time.Minute}
		for _, b := range req.Blobs {
			if b.Want {
				known := announce.BlobAnswer{Digest: b.Digest}
				if m := infos[b.Digest]; m != nil {
					known.Metainfo = m.Marshal()
				}
				answer.Blobs = append(answer.Blobs, known)
				select {
				case h <- struct{}{}:
				default:
				}
			}
		}
		select {
		case <-ready:
		case <-r.Context().Done():
			return
		}
		_ = json.NewEncoder(w).Encode(answer)
	}))
	t.Cleanup(s.Close)
	return s.URL, h
}

func atOnce() <-chan struct{} {
	ready := make(chan struct{})
	close(ready)
	return ready
}

// complaints is what an agent logs as a warning or worse.
type complaints struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (c *complaints) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.Write(b)
}

func (c *complaints) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.String()
}

// running is an agent that runs until the end of the test.
type running struct {
	*Agent
	t   testing.TB
	reg *prometheus.Registry
	log *complaints
}

func start(t *testing.T, o *source, tracker string) *running {
	t.Helper()
	// Sources that are not allowed to send are not to be given up.
	return startWith(t, Config{Config: role.Config{Origins: []ring.Member{{ID: "o", URL: o.URL}}}, Tracker: role.Endpoint{URL: tracker}, Peer: Peer{StallTimeout: config.Duration(time.Minute)}})
}

// startWith fills in what a test does not care for.
func startWith(t testing.TB, cfg Config) *running {
	t.Helper()
	r := &running{t: t, reg: prometheus.NewRegistry(), log: &complaints{}}
	cfg.Server = transport.ServerConfig{Listen: "127.0.0.1:0", DrainTimeout: config.Duration(5 * time.Second)}
	alone := cfg.BuildIndex.URL == ""
	if alone {
		cfg.BuildIndex.URL = "http://127.0.0.1:1"
	}
	cfg.Peer.Listen, cfg.Peer.StockPeers = "127.0.0.1:0", true
	if cfg.OriginPatience == 0 {
		cfg.OriginPatience = config.Duration(time.Millisecond) // nobody comes back in most tests
	}
	if cfg.Names == nil {
		cfg.Names = []string{"kraken.example"}
	}
	if cfg.Cache.Dir == "" {
		cfg.Cache.Dir = t.TempDir()
	}
	a, err := New(cfg, role.Deps{Log: slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelWarn})), Registry: r.reg})
	if err != nil {
		t.Fatal(err)
	}
	r.Agent = a
	if alone {
		a.namer.Set(cluster.Upstreams{}) // as build-index has said once: nothing is mirrored, and nothing private
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	return r
}

// get asks for a blob with a connection of its own, as containerd's parallel readers do; rng may be empty. Closing the
// body closes the connection.
func (r *running) get(ctx context.Context, d digest.Digest, rng string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://%s/v2/demo/app/blobs/%s", r.Addr(), d), nil)
	if err != nil {
		return nil, err
	}
	want := http.StatusOK
	if rng != "" {
		req.Header.Set("Range", "bytes="+rng)
		want = http.StatusPartialContent
	}
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != want {
		resp.Body.Close()
		return nil, fmt.Errorf("status %d, want %d", resp.StatusCode, want)
	}
	return resp.Body, nil
}

// whole reads a blob and checks it.
func (r *running) whole(b []byte) error {
	body, err := r.get(context.Background(), digest.FromBytes(b), "")
	if err != nil {
		return err
	}
	defer body.Close()
	got, err := io.ReadAll(body)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, b) {
		return fmt.Errorf("%d other bytes, want %d", len(got), len(b))
	}
	return nil
}

// metric sums a counter over the labels that keep returns true for.
func (r *running) metric(name string, keep func(labels map[string]string) bool) (sum float64) {
	r.t.Helper()
	all, err := r.reg.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range all {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.Metric {
			labels := map[string]string{}
			for _, l := range m.Label {
				labels[l.GetName()] = l.GetValue()
			}
			if keep == nil || keep(labels) {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

// answered is how many requests are over.
func (r *running) answered() int { return int(r.metric("kraken_http_requests_total", nil)) }

func (r *running) pulling() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.pulls)
}

// missing is how many bytes of a blob in flight are missing, -1 when that is not known.
func (r *running) missing(d digest.Digest) int64 {
	r.mu.Lock()
	p := r.pulls[d]
	r.mu.Unlock()
	if p == nil {
		return -1
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.report.missing == nil {
		return -1
	}
	return p.report.missing()
}

// waiting is how many readers a blob in flight has.
func (r *running) waiting(d digest.Digest) int {
	r.mu.Lock()
	p := r.pulls[d]
	r.mu.Unlock()
	if p == nil {
		return 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.in == nil {
		return p.waiting
	}
	return p.waiting + p.in.readers
}

func (r *running) cached(d digest.Digest) bool {
	_, err := r.store.Stat(d)
	return err == nil
}

// noErrors checks that nothing was counted or logged as one.
func (r *running) noErrors() {
	r.t.Helper()
	for _, name := range []string{"kraken_agent_pulls_failed_total", "kraken_agent_tracker_errors_total"} {
		if n := r.metric(name, nil); n != 0 {
			r.t.Errorf("%s is %v, want 0", name, n)
		}
	}
	if n := r.metric("kraken_http_requests_total", func(l map[string]string) bool { return strings.HasPrefix(l["status"], "5") }); n != 0 {
		r.t.Errorf("%v requests count as errors of the agent", n)
	}
	if s := r.log.String(); s != "" {
		r.t.Errorf("the agent complains:\n%s", s)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

func noise(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// TestAbandonedReads: a runtime that reads in parallel asks for "from N on" many times, takes a part of each and closes
// the connection. That is how it reads, and no error.
func TestAbandonedReads(t *testing.T) {
	b := noise(1, 16<<20)
	d := digest.FromBytes(b)
	for _, how := range []string{"swarm", "HTTP"} {
		t.Run("while the blob is looked for, "+how, func(t *testing.T) {
			o := newSource(t, b)
			o.noMetainfo = how == "HTTP"
			ready := make(chan struct{})
			tracker, asked := lonely(t, ready, nil)
			r := start(t, o, tracker)
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() {
				_, err := r.get(ctx, d, "1048576-")
				ended <- err
			}()
			<-asked
			cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Errorf("the reader got %v", err)
			}
			eventually(t, "the pull ends", func() bool { return r.answered() == 1 && r.pulling() == 0 })
			r.noErrors()
			close(ready)
			o.allow(everything)
			if err := r.whole(b); err != nil {
				t.Error(err)
			}
			r.noErrors()
		})
		t.Run("before their first byte, "+how, func(t *testing.T) {
			o := newSource(t, b)
			o.noMetainfo = how == "HTTP"
			tracker, _ := lonely(t, atOnce(), nil)
			r := start(t, o, tracker)
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			const readers = 4
			for i := range readers {
				wg.Go(func() {
					if _, err := r.get(ctx, d, fmt.Sprintf("%d-", i*len(b)/readers)); !errors.Is(err, context.Canceled) {
						t.Errorf("reader %d got %v", i, err)
					}
				})
			}
			eventually(t, "the origin sends and all wait", func() bool { return o.bodies() > 0 && r.waiting(d) == readers })
			cancel()
			wg.Wait()
			eventually(t, "the pull ends", func() bool { return r.answered() == readers && r.pulling() == 0 })
			r.noErrors()
		})
	}
	t.Run("midway", func(t *testing.T) {
		o := newSource(t, b)
		tracker, _ := lonely(t, atOnce(), nil)
		r := start(t, o, tracker)
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := r.whole(b); err != nil {
				t.Errorf("who reads to the end: %v", err)
			}
		})
		const readers = 7
		for i := 1; i <= readers; i++ {
			wg.Go(func() {
				off := i * (len(b) / (readers + 1))
				body, err := r.get(t.Context(), d, fmt.Sprintf("%d-", off))
				if err != nil {
					t.Errorf("reader at %d: %v", off, err)
					return
				}
				defer body.Close()
				got := make([]byte, 300_000)
				if _, err := io.ReadFull(body, got); err != nil || !bytes.Equal(got, b[off:off+len(got)]) {
					t.Errorf("reader at %d: wrong bytes or %v", off, err)
				}
			})
		}
		// In bits, so that they go while the blob is in flight.
		for sent := 0; sent < len(b); sent += 1 << 20 {
			o.allow(1 << 20)
		}
		o.allow(everything)
		wg.Wait()
		eventually(t, "all requests end", func() bool { return r.answered() == readers+1 })
		r.noErrors()
	})
}

// TestAbandonedTailIsNotWanted: what a reader would have read is not asked for first any more when it has gone.
func TestAbandonedTailIsNotWanted(t *testing.T) {
	b := noise(2, 64<<20)
	d := digest.FromBytes(b)
	o := newSource(t, b)
	m := o.infos[d]
	tracker, _ := lonely(t, atOnce(), nil)
	r := start(t, o, tracker)
	const far = 48 << 20 // beyond the read-ahead of the one who stays
	tail := func(q cluster.LeaseRequest) bool {
		for _, i := range q.Want {
			if int64(i)*m.PieceLength() >= far {
				return true
			}
		}
		return false
	}
	stays := make(chan error, 1)
	go func() { stays <- r.whole(b) }()
	eventually(t, "it reads", func() bool { return r.waiting(d) == 1 })
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	body := make(chan io.ReadCloser, 1)
	go func() {
		rc, err := r.get(ctx, d, fmt.Sprintf("%d-", far))
		if err != nil {
			t.Errorf("the one that leaves: %v", err)
		}
		body <- rc
	}()
	eventually(t, "both read", func() bool { return r.waiting(d) == 2 })
	wanted := func() bool {
		for _, q := range o.requests(0) {
			if tail(q) {
				return true
			}
		}
		return false
	}
	// A little at a time, so that leases stay small.
	eventually(t, "what the second reader waits for is leased", func() bool {
		o.allow(64 << 10)
		return wanted()
	})
	var rc io.ReadCloser
	eventually(t, "its first bytes", func() bool {
		o.allow(64 << 10)
		select {
		case rc = <-body:
			return true
		default:
			return false
		}
	})
	if rc == nil {
		return
	}
	if _, err := io.ReadFull(rc, make([]byte, 1000)); err != nil {
		t.Errorf("the one that leaves: %v", err)
	}
	rc.Close()
	eventually(t, "it has left", func() bool { return r.answered() == 1 })
	// From here on no request may want the tail, until the one who stays comes near; one may be on its way.
	before := len(o.requests(0)) + 1
	eventually(t, "a few leases more", func() bool {
		o.allow(64 << 10)
		return len(o.requests(before)) >= 3
	})
	if left := r.missing(d); left < int64(len(b)-far+readAhead) {
		t.Fatalf("%d bytes are left: the one who stays may be near", left)
	}
	for _, q := range o.requests(before) {
		if tail(q) {
			t.Errorf("pieces %v are wanted first, and nobody reads from %d on any more", q.Want, far/m.PieceLength())
			break
		}
	}
	o.allow(everything)
	if err := <-stays; err != nil {
		t.Errorf("the one that stays: %v", err)
	}
	r.noErrors()
}

// TestReadersAtSeveralOffsets: each gets its first bytes after the origin has sent little more than these, wherever in
// the blob it begins.
func TestReadersAtSeveralOffsets(t *testing.T) {
	b := noise(3, 32<<20)
	d := digest.FromBytes(b)
	o := newSource(t, b)
	tracker, _ := lonely(t, atOnce(), nil)
	r := start(t, o, tracker)
	const readers = 8
	var wg sync.WaitGroup
	begun := make(chan struct{}, readers)
	for i := range readers {
		wg.Go(func() {
			off := (readers - 1 - i) * len(b) / readers
			body, err := r.get(t.Context(), d, fmt.Sprintf("%d-", off))
			if err != nil {
				t.Errorf("reader at %d: %v", off, err)
				return
			}
			defer body.Close()
			got := make([]byte, 100_000)
			if _, err := io.ReadFull(body, got); err != nil || !bytes.Equal(got, b[off:off+len(got)]) {
				t.Errorf("reader at %d: wrong bytes or %v", off, err)
			}
			begun <- struct{}{}
			if _, err := io.Copy(io.Discard, body); err != nil {
				t.Errorf("reader at %d: %v", off, err)
			}
		})
	}
	eventually(t, "all read", func() bool { return r.waiting(d) == readers })
	// A first lease may have been taken before anybody read, and both workers read ahead; an eighth of the blob in file
	// order serves one.
	o.allow(int64(len(b) / readers))
	for range readers {
		select {
		case <-begun:
		case <-time.After(20 * time.Second):
			t.Fatalf("a reader waits although the origin has sent %d bytes", len(b)/readers)
		}
	}
	o.allow(everything)
	wg.Wait()
}

// TestSlowReaders: clients that take nothing for now keep nobody waiting and cost no memory; they get the rest when
// they go on.
func TestSlowReaders(t *testing.T) {
	b := noise(4, 16<<20)
	d := digest.FromBytes(b)
	for _, how := range []string{"swarm", "HTTP"} {
		t.Run(how, func(t *testing.T) {
			o := newSource(t, b)
			o.noMetainfo = how == "HTTP"
			tracker, _ := lonely(t, atOnce(), nil)
			r := start(t, o, tracker)
			const readers = 8
			var conns []*net.TCPConn
			for range readers {
				nc, err := net.Dial("tcp", r.Addr())
				if err != nil {
					t.Fatal(err)
				}
				defer nc.Close()
				tc := nc.(*net.TCPConn)
				if err := tc.SetReadBuffer(64 << 10); err != nil {
					t.Fatal(err)
				}
				fmt.Fprintf(tc, "GET /v2/demo/app/blobs/%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", d)
				conns = append(conns, tc)
			}
			eventually(t, "all read", func() bool { return r.waiting(d) == readers })
			before := heap()
			o.allow(everything)
			eventually(t, "the pull is over", func() bool { return r.cached(d) && r.pulling() == 0 })
			if n := r.answered(); n > 0 {
				t.Fatalf("%d of %d requests are over: the clients are not slow", n, readers)
			}
			if grown := heap() - before; grown > 8<<20 {
				t.Errorf("%d bytes more are held for %d clients that read nothing", grown, readers)
			}
			var wg sync.WaitGroup
			for _, tc := range conns {
				wg.Go(func() {
					if err := tc.SetReadBuffer(1 << 20); err != nil {
						t.Error(err)
					}
					answer, err := io.ReadAll(tc)
					_, body, _ := bytes.Cut(answer, []byte("\r\n\r\n"))
					if err != nil || !bytes.Equal(body, b) {
						t.Errorf("%d bytes and %v, want the blob", len(body), err)
					}
				})
			}
			wg.Wait()
			r.noErrors()
		})
	}
}

// TestManyBlobsAtOnce: a hundred pulls share few connections to the origin, and little memory.
func TestManyBlobsAtOnce(t *testing.T) {
	const blobs, size = 100, 2 << 20
	var all [][]byte
	for i := range blobs {
		all = append(all, noise(byte(100+i), size))
	}
	o := newSource(t, all...)
	tracker, _ := lonely(t, atOnce(), o.infos)
	r := start(t, o, tracker)
	before := heap()
	var wg sync.WaitGroup
	for _, b := range all {
		wg.Go(func() {
			body, err := r.get(t.Context(), digest.FromBytes(b), "")
			if err != nil {
				t.Error(err)
				return
			}
			defer body.Close()
			h := digest.Canonical.Digester()
			if _, err := io.Copy(h.Hash(), body); err != nil || h.Digest() != digest.FromBytes(b) {
				t.Errorf("%v, or other bytes", err)
			}
		})
	}
	eventually(t, "all are pulled", func() bool { return r.pulling() == blobs })
	peak := heap() - before
	stop := make(chan struct{})
	var sampled sync.WaitGroup
	sampled.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				peak = max(peak, heap()-before)
			}
		}
	})
	o.allow(everything)
	wg.Wait()
	close(stop)
	sampled.Wait()
	o.mu.Lock()
	defer o.mu.Unlock()
	// A connection is often made while another one becomes free, the more so where the machine is busy.
	if o.mostConn > 4*16 {
		t.Errorf("%d connections with one origin for %d pulls, want about 16", o.mostConn, blobs)
	}
	if peak > 128<<20 {
		t.Errorf("%d bytes more are held for %d pulls", peak, blobs)
	}
	// A tracker of this process may be late: it shares the CPUs with a hundred pulls.
	if n := r.metric("kraken_agent_pulls_failed_total", nil); n != 0 {
		t.Errorf("%v pulls failed", n)
	}
}

// heap is what is in use after a collection.
func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestLastReaderLeaves: then the fetch ends, unless most of the blob is there.
func TestLastReaderLeaves(t *testing.T) {
	b := noise(5, 16<<20)
	d := digest.FromBytes(b)
	for _, how := range []string{"swarm", "HTTP"} {
		begin := func(t *testing.T, part int64) (*source, *running, [2]io.ReadCloser) {
			o := newSource(t, b)
			o.noMetainfo = how == "HTTP"
			tracker, _ := lonely(t, atOnce(), o.infos)
			r := start(t, o, tracker)
			o.allow(part)
			var readers [2]io.ReadCloser
			for i := range readers {
				body, err := r.get(t.Context(), d, "")
				if err != nil {
					t.Fatal(err)
				}
				readers[i] = body
				if _, err := io.ReadFull(body, make([]byte, 1000)); err != nil {
					t.Fatal(err)
				}
			}
			// All but parts of a piece for each of the workers.
			eventually(t, "the part is there", func() bool { return int64(len(b))-r.missing(d) >= part-1<<20 })
			return o, r, readers
		}
		t.Run("early, "+how, func(t *testing.T) {
			part := int64(len(b) / 4)
			o, r, readers := begin(t, part)
			readers[0].Close()
			eventually(t, "one has left", func() bool { return r.answered() == 1 })
			eventually(t, "the fetch goes on", func() bool { return o.bodies() > 0 })
			readers[1].Close()
			eventually(t, "the fetch ends", func() bool { return r.pulling() == 0 && o.bodies() == 0 })
			o.allow(everything)
			if r.cached(d) {
				t.Error("nobody reads, and the blob was fetched to the end")
			}
			r.noErrors()
			if err := r.whole(b); err != nil {
				t.Errorf("the next reader: %v", err)
			}
			if got := r.metric("kraken_agent_origin_lease_bytes_total", nil); how == "swarm" && got > float64(len(b)+1<<20) {
				t.Errorf("%v bytes were fetched of %d: the next reader did not go on where the first stopped", got, len(b))
			}
		})
		t.Run("late, "+how, func(t *testing.T) {
			o, r, readers := begin(t, int64(len(b)*3/4))
			for _, body := range readers {
				body.Close()
			}
			eventually(t, "both have left", func() bool { return r.answered() == 2 })
			eventually(t, "the fetch goes on", func() bool { return o.bodies() > 0 })
			o.allow(everything)
			eventually(t, "the blob is there", func() bool { return r.cached(d) && r.pulling() == 0 })
			r.noErrors()
		})
	}
}
