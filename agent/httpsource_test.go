package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"

	"kraken/origin/store"
	"kraken/origin/swarm"
	"kraken/proto/cluster"
	"kraken/proto/config"
	"kraken/proto/registry"
	"kraken/proto/ring"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// The library ends these by themselves a moment after Close: dial attempts in flight.
		goleak.IgnoreAnyFunction("github.com/anacrolix/torrent.(*dialPool).drainAndCloseRemainingDials"),
	)
}

// How long an origin may be silent in these tests: always much longer than a healthy one takes. A busy machine keeps
// whole processes waiting, and then healthy origins seem silent.
const (
	patientStall = 2 * stall              // where nobody is silent, which is the default
	stall        = 2 * time.Second        // where somebody is, and it matters who else is asked
	shortStall   = 500 * time.Millisecond // where many of them are waited for
)

// silentFor is the configuration of an agent that waits so long for an origin.
func silentFor(d time.Duration) Config {
	return Config{Peer: Peer{StallTimeout: config.Duration(d)}}
}

// answer is how an origin answers one request for a blob.
type answer func(w http.ResponseWriter, r *http.Request, b []byte)

func serve(w http.ResponseWriter, r *http.Request, b []byte) {
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
}

// begin sends the headers of what was asked for, and its first n bytes. It says whether more should follow.
func begin(w http.ResponseWriter, r *http.Request, b []byte, n int) (more bool) {
	from := 0
	if s, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes="); ok {
		from, _ = strconv.Atoi(strings.TrimSuffix(s, "-"))
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(b)-1, len(b)))
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(b)-from))
	if from > 0 {
		w.WriteHeader(http.StatusPartialContent)
	}
	_, _ = w.Write(b[from:min(from+n, len(b))])
	_ = http.NewResponseController(w).Flush()
	return from+n < len(b)
}

func hang(_ http.ResponseWriter, r *http.Request, _ []byte) { <-r.Context().Done() }

// hangAfter sends n bytes of what was asked for.
func hangAfter(n int) answer {
	return func(w http.ResponseWriter, r *http.Request, b []byte) {
		if begin(w, r, b, n) {
			<-r.Context().Done()
		}
	}
}

// endAfter sends n bytes of what was asked for, and no more, whatever Content-Length said.
func endAfter(n int) answer {
	return func(w http.ResponseWriter, r *http.Request, b []byte) { begin(w, r, b, n) }
}

// resetAfter sends n bytes of what was asked for, and resets the connection.
func resetAfter(n int) answer {
	return func(w http.ResponseWriter, r *http.Request, b []byte) {
		begin(w, r, b, n)
		c, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		_ = c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
}

func withoutRanges(w http.ResponseWriter, _ *http.Request, b []byte) {
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	_, _ = w.Write(b)
}

func noSuchRange(w http.ResponseWriter, r *http.Request, b []byte) {
	w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", len(b)))
	registry.WriteError(w, r, registry.ErrRangeNotSatisfiable)
}

func refuse(err error) answer {
	return func(w http.ResponseWriter, r *http.Request, _ []byte) { registry.WriteError(w, r, err) }
}

var (
	unknown = refuse(registry.ErrBlobUnknown)
	broken  = refuse(registry.ErrInternal)
	busy    = refuse(registry.ErrUnavailable)
)

// other answers as a does, of an origin that holds b for the blob.
func other(b []byte, a answer) answer {
	return func(w http.ResponseWriter, r *http.Request, _ []byte) { a(w, r, b) }
}

// hop is an origin that answers one request after the other as it is told, the last way for ever. It has no metainfo,
// or is silent about it.
type hop struct {
	*httptest.Server
	blob   []byte
	says   []answer
	silent bool
	// arriving answers how far the blob is, the how-manieth time; nil: the origin is of a version that does not know.
	arriving func(n int) cluster.Arriving

	mu    sync.Mutex
	asked int      // how far the blob is
	got   []string // the Range of each request
	open  int      // requests under way
}

func (h *hop) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !strings.Contains(r.URL.Path, "/blobs/") {
		if h.silent {
			<-r.Context().Done()
		}
		if h.arriving != nil && strings.Contains(r.URL.Path, "/arriving/") {
			h.mu.Lock()
			h.asked++
			n := h.asked
			h.mu.Unlock()
			_ = json.NewEncoder(w).Encode(h.arriving(n))
			return
		}
		err := registry.ErrBlobUnknown
		if strings.Contains(r.URL.Path, "/arriving/") { // which would say 404 only of what is nowhere
			err = registry.ErrUnsupported
		}
		registry.WriteError(w, r, err)
		return
	}
	h.mu.Lock()
	say := h.says[min(len(h.got), len(h.says)-1)]
	h.got = append(h.got, r.Header.Get("Range"))
	h.open++
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.open--
	}()
	say(w, r, h.blob)
}

func (h *hop) ranges() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.got)
}

// course is an agent and origins, in the order in which they are asked for one blob. The first two own it.
type course struct {
	*running
	hops []*hop
	blob []byte
	d    digest.Digest
}

// newCourse starts both. A blob that is not small has no metainfo.
func newCourse(t *testing.T, b []byte, says ...[]answer) *course {
	t.Helper()
	return newCourseWith(t, Config{}, b, says...)
}

func newCourseWith(t *testing.T, cfg Config, b []byte, says ...[]answer) *course {
	t.Helper()
	c := &course{blob: b, d: digest.FromBytes(b)}
	var members []ring.Member
	ids := []string{"o1", "o2", "o3", "o4"}[:len(says)]
	for i, id := range ring.New(ids, 2).Order(c.d) {
		h := &hop{blob: b, says: says[i]}
		h.Server = httptest.NewServer(h)
		t.Cleanup(h.Close)
		c.hops = append(c.hops, h)
		members = append(members, ring.Member{ID: id, URL: h.URL})
	}
	tracker, _ := lonely(t, atOnce(), nil)
	cfg.Origins, cfg.Tracker.URL = members, tracker
	if cfg.Peer.StallTimeout == 0 {
		cfg.Peer.StallTimeout = config.Duration(patientStall)
	}
	cfg.Client.ProgressTimeout = 6 * cfg.Peer.StallTimeout
	c.running = startWith(t, cfg)
	if len(b) <= 1<<20 {
		c.sizes.Add(c.d, int64(len(b)))
	}
	return c
}

// asked checks which ranges the origins were asked for; * is any range but the whole.
func (c *course) asked(want ...[]string) {
	c.t.Helper()
	for i, h := range c.hops {
		got := h.ranges()
		same := slices.EqualFunc(got, want[i], func(got, want string) bool { return got == want || want == "*" && got != "" })
		if !same {
			c.t.Errorf("origin %d was asked for %q, want %q", i+1, got, want[i])
		}
	}
}

// TestTakeOver: whatever an origin does, the blob comes whole while one has it, no byte of it twice.
func TestTakeOver(t *testing.T) {
	t.Run("followed", func(t *testing.T) { testTakeOver(t, 300_000, 100_000) })
	t.Run("held", func(t *testing.T) { testTakeOver(t, 60_000, 20_000) })
}

func testTakeOver(t *testing.T, size, part int) {
	b := noise(20, size)
	fromPart := fmt.Sprintf("bytes=%d-", part)
	whole := []string{""}
	for name, tc := range map[string]struct {
		says [][]answer
		want [][]string
		hang bool // somebody is silent
	}{
		"the first one is fine":               {[][]answer{{serve}, {serve}}, [][]string{whole, nil}, false},
		"silent from the start":               {[][]answer{{hang}, {serve}}, [][]string{whole, whole}, true},
		"silent after the headers":            {[][]answer{{hangAfter(0)}, {serve}}, [][]string{whole, whole}, true},
		"silent midway":                       {[][]answer{{hangAfter(part)}, {serve}}, [][]string{whole, {fromPart}}, true},
		"reset midway":                        {[][]answer{{resetAfter(part)}, {serve}}, nil, false},
		"ends midway":                         {[][]answer{{endAfter(part)}, {serve}}, [][]string{whole, {fromPart}}, false},
		"ends before its last byte":           {[][]answer{{endAfter(size - 1)}, {serve}}, [][]string{whole, {fmt.Sprintf("bytes=%d-", size-1)}}, false},
		"the next one ignores ranges":         {[][]answer{{endAfter(part)}, {withoutRanges}}, [][]string{whole, {fromPart}}, false},
		"the next one refuses the range":      {[][]answer{{endAfter(part)}, {noSuchRange}, {serve}}, [][]string{whole, {fromPart}, {fromPart}}, false},
		"the next one has another size":       {[][]answer{{endAfter(part)}, {other(b[:size/2], serve)}, {serve}}, [][]string{whole, {fromPart}, {fromPart}}, false},
		"the next one has less than is there": {[][]answer{{endAfter(part)}, {other(b[:part/2], serve)}, {serve}}, [][]string{whole, {fromPart}, {fromPart}}, false},
		"refused":                             {[][]answer{{broken}, {serve}}, [][]string{whole, whole}, false},
		"unknown to the first":                {[][]answer{{unknown}, {serve}}, [][]string{whole, whole}, false},
		"no owner answers":                    {[][]answer{{broken}, {busy}, {serve}}, [][]string{whole, whole, whole}, false},
		"one owner hangs, one refuses":        {[][]answer{{hang}, {busy}, {serve}}, [][]string{whole, whole, whole}, true},
		"the second turn":                     {[][]answer{{busy, serve}, {busy}}, [][]string{{"", ""}, whole}, false},
		"by turns": {
			[][]answer{{endAfter(part), serve}, {endAfter(part)}}, [][]string{{"", fmt.Sprintf("bytes=%d-", 2*part)}, {fromPart}}, false,
		},
		"all silent, once each": {
			[][]answer{{hangAfter(part), serve}, {hangAfter(part)}, {broken}}, [][]string{{"", fmt.Sprintf("bytes=%d-", 2*part)}, {fromPart}, nil}, true,
		},
		"more pieces than turns": {[][]answer{{endAfter(worthwhile)}, {endAfter(worthwhile)}}, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			stall := stall
			if !tc.hang {
				stall = patientStall
			}
			c := newCourseWith(t, silentFor(stall), b, tc.says...)
			began := time.Now()
			if err := c.whole(b); err != nil {
				t.Fatal(err)
			}
			took := time.Since(began)
			if n := len(tc.says); tc.hang && took < stall || took > time.Duration(n+3)*stall {
				t.Errorf("it took %s, a stall is %s", took, stall)
			}
			if tc.want != nil {
				c.asked(tc.want...)
			}
			if got := c.metric("kraken_agent_origin_http_bytes_total", nil); got != float64(size) {
				t.Errorf("%v bytes were taken, want %d", got, size)
			}
			eventually(t, "it is cached", func() bool { return c.cached(c.d) && c.pulling() == 0 })
			c.noErrors()
		})
	}
}

// TestTakeOverUnnoticed: readers that follow a blob in flight, small or not, get what has come while an origin hangs,
// and the rest from the next.
func TestTakeOverUnnoticed(t *testing.T) {
	for name, size := range map[string]int{"small": 1 << 20, "without metainfo": 8 << 20} {
		t.Run(name, func(t *testing.T) {
			b := noise(21, size)
			part := size / 2
			const unsent = 16 << 10 // may be in a buffer of the agent's server
			read := make(chan struct{})
			c := newCourseWith(t, silentFor(stall), b, []answer{hangAfter(part)}, []answer{func(w http.ResponseWriter, r *http.Request, b []byte) {
				<-read
				serve(w, r, b)
			}})
			var wg, prefix sync.WaitGroup
			for _, off := range []int{0, 0, part / 2, part - unsent - 10} {
				prefix.Add(1)
				wg.Go(func() {
					rng := ""
					if off > 0 {
						rng = fmt.Sprintf("%d-", off)
					}
					body, err := c.get(t.Context(), c.d, rng)
					if err != nil {
						t.Errorf("reader at %d: %v", off, err)
						prefix.Done()
						return
					}
					defer body.Close()
					got := make([]byte, size-off)
					_, err = io.ReadFull(body, got[:part-unsent-off])
					prefix.Done()
					if err == nil {
						_, err = io.ReadFull(body, got[part-unsent-off:])
					}
					if err != nil || !bytes.Equal(got, b[off:]) {
						t.Errorf("reader at %d: other bytes, or %v", off, err)
					}
					if n, err := body.Read(make([]byte, 1)); n > 0 || err != io.EOF {
						t.Errorf("reader at %d: %d bytes and %v after the last one", off, n, err)
					}
				})
			}
			prefix.Wait()
			close(read)
			wg.Wait()
			c.asked([]string{""}, []string{fmt.Sprintf("bytes=%d-", part)})
			c.noErrors()
		})
	}
}

// TestSilentAboutMetainfo: an origin that hangs costs one stall timeout, not one for the metainfo and one for the
// bytes.
func TestSilentAboutMetainfo(t *testing.T) {
	b := noise(28, 2<<20)
	c := newCourseWith(t, silentFor(stall), b, []answer{hang}, []answer{serve})
	c.hops[0].silent = true
	began := time.Now()
	if err := c.whole(b); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took < stall {
		t.Errorf("it took %s, a stall is %s", took, stall)
	}
	c.asked(nil, []string{""})
}

// TestNobodyDelivers: what the client is told, and how often who is asked.
func TestNobodyDelivers(t *testing.T) {
	b := noise(22, 10_000)
	once, twice := []string{""}, []string{"", ""}
	for name, tc := range map[string]struct {
		says   [][]answer
		status int
		want   [][]string
		names  int // how many origins the error names
	}{
		"nobody knows it":                {[][]answer{{unknown}, {unknown}, {serve}}, http.StatusNotFound, [][]string{once, once, nil}, 0},
		"all are down":                   {[][]answer{{busy}, {broken}}, http.StatusServiceUnavailable, [][]string{twice, twice}, 2},
		"one does not know, one is down": {[][]answer{{unknown}, {busy}}, http.StatusServiceUnavailable, [][]string{once, twice}, 2},
		"helpers don't know, owners are down": {
			[][]answer{{busy}, {busy}, {unknown}}, http.StatusServiceUnavailable, [][]string{twice, twice, once}, 3,
		},
		"a bad digest": {[][]answer{{refuse(registry.ErrDigestInvalid)}, {serve}}, http.StatusBadRequest, [][]string{once, nil}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCourse(t, b, tc.says...)
			status, text := c.refused()
			if status != tc.status {
				t.Errorf("status %d, want %d: %s", status, tc.status, text)
			}
			named := 0
			for i, h := range c.hops {
				if strings.Contains(text, fmt.Sprintf("origin o%d: ", i+1)) {
					named++
				}
				if strings.Contains(text, strings.TrimPrefix(h.URL, "http://")) {
					t.Errorf("an address is named in %q", text)
				}
			}
			if named != tc.names {
				t.Errorf("%d origins are named in %q, want %d", named, text, tc.names)
			}
			c.asked(tc.want...)
			failed := 1.0
			if tc.status == http.StatusNotFound {
				failed = 0 // there was nothing to pull
			}
			if n := c.metric("kraken_agent_pulls_failed_total", nil); n != failed {
				t.Errorf("%v failed pulls are counted, want %v", n, failed)
			}
		})
	}
}

// TestOriginsAwayForAMoment: a blob of the cluster's own is waited for while its origins restart, or the bucket is away
// that alone has it: before its first byte and after it, cached or relayed. One of an upstream is not, because runtimes
// go on at the upstream.
func TestOriginsAwayForAMoment(t *testing.T) {
	away := func(before ...answer) []answer { return append(before, busy, busy, busy, busy, busy, serve) }
	full := Cache{Capacity: 100}
	for name, tc := range map[string]struct {
		size  int
		cache Cache
		part  registry.Range
		says  [][]answer
	}{
		"a small one":                 {10_000, Cache{}, registry.Whole, [][]answer{away(), away()}},
		"a large one":                 {2 << 20, Cache{}, registry.Whole, [][]answer{away(), away()}},
		"one that was begun":          {2 << 20, Cache{}, registry.Whole, [][]answer{away(resetAfter(1 << 20)), away()}},
		"a small one, relayed":        {10_000, full, registry.Whole, [][]answer{away(), away()}},
		"a large one, relayed":        {200_000, full, registry.Whole, [][]answer{away(), away()}},
		"a part, relayed":             {200_000, full, registry.Range{Offset: 5, Length: -1}, [][]answer{away(), away()}},
		"one that was begun, relayed": {200_000, full, registry.Whole, [][]answer{away(resetAfter(100_000)), away()}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := noise(29, tc.size)
			c := newCourseWith(t, Config{Cache: tc.cache, OriginPatience: config.Duration(time.Minute)}, b, tc.says...)
			if err := c.readsAt(tc.part.Offset); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("an upstream's", func(t *testing.T) {
		c := newCourseWith(t, Config{OriginPatience: config.Duration(time.Minute)}, noise(30, 10_000), away(), away())
		c.namer.Set(cluster.Upstreams{Upstreams: []cluster.Upstream{{Registry: "docker.io"}}})
		if _, err := c.OpenBlob(t.Context(), "docker.io/library/app", c.d, registry.Whole); !errors.Is(err, registry.ErrUnavailable) {
			t.Errorf("%v, want %v", err, registry.ErrUnavailable)
		}
		c.asked([]string{"", ""}, []string{"", ""})
	})
}

// readsAt reads the blob from off to its end.
func (c *course) readsAt(off int64) error {
	content, err := c.OpenBlob(c.t.Context(), "demo/app", c.d, registry.Range{Offset: off, Length: -1})
	if err != nil {
		return err
	}
	defer content.Close()
	r := content.Reader()
	if _, err := r.Seek(off, io.SeekStart); err != nil {
		return err
	}
	got, err := io.ReadAll(r)
	if err == nil && !bytes.Equal(got, c.blob[off:]) {
		err = fmt.Errorf("%d other bytes, want %d", len(got), len(c.blob)-int(off))
	}
	return err
}

// refused asks for the blob, which does not come.
func (c *course) refused() (status int, text string) {
	c.t.Helper()
	resp, err := http.Get(fmt.Sprintf("http://%s/v2/demo/app/blobs/%s", c.Addr(), c.d))
	if err != nil {
		c.t.Fatal(err)
	}
	defer resp.Body.Close()
	defer http.DefaultClient.CloseIdleConnections()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	var body struct {
		Errors []struct{ Message string }
	}
	if err := json.Unmarshal(raw, &body); err != nil || len(body.Errors) != 1 {
		c.t.Fatalf("%v: %s", err, raw)
	}
	return resp.StatusCode, body.Errors[0].Message
}

// TestAllSilent: the pull fails when nothing has come for the client's progress timeout, and not before; of the origins
// that don't own the blob not all are asked for what may be the bucket's fault.
func TestAllSilent(t *testing.T) {
	b := noise(23, 10_000)
	c := newCourseWith(t, silentFor(shortStall), b, []answer{hang}, []answer{hangAfter(10)}, []answer{hang}, []answer{hang})
	began := time.Now()
	if err := c.whole(b); err == nil {
		t.Error("the blob came")
	}
	took := time.Since(began)
	if limit := 6 * shortStall; took < limit || took > 4*limit {
		t.Errorf("it took %s, want about %s", took, limit)
	}
	if n := len(c.hops[0].ranges()); n < 2 {
		t.Errorf("the first owner was asked %d times", n)
	}
	if n := len(c.hops[3].ranges()); n > 0 {
		t.Errorf("the last origin was asked %d times", n)
	}
	eventually(t, "no request is left", func() bool { return c.pulling() == 0 && c.requests() == 0 })
	if c.cached(c.d) {
		t.Error("a part is cached as the blob")
	}
}

// requests are under way at the origins.
func (c *course) requests() (n int) {
	for _, h := range c.hops {
		h.mu.Lock()
		n += h.open
		h.mu.Unlock()
	}
	return n
}

// TestSlowBucket: an origin that needs long for its first byte is waited for, where nobody else has the blob.
func TestSlowBucket(t *testing.T) {
	b := noise(24, 10_000)
	var first sync.Once
	ready := make(chan struct{})
	cold := func(w http.ResponseWriter, r *http.Request, b []byte) {
		first.Do(func() { time.AfterFunc(2*shortStall, func() { close(ready) }) })
		select {
		case <-ready:
			serve(w, r, b)
		case <-r.Context().Done():
		}
	}
	c := newCourseWith(t, silentFor(shortStall), b, []answer{cold})
	if err := c.whole(b); err != nil {
		t.Error(err)
	}
	c.noErrors()
}

// TestReaderLeavesWhileAnOriginHangs: then nobody is asked any more.
func TestReaderLeavesWhileAnOriginHangs(t *testing.T) {
	const size = 1 << 20
	b := noise(25, size)
	for name, says := range map[string][]answer{"from the start": {hang}, "midway": {hangAfter(size / 4)}} {
		t.Run(name, func(t *testing.T) {
			c := newCourseWith(t, silentFor(stall), b, says, []answer{hang})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var wg sync.WaitGroup
			wg.Go(func() {
				body, err := c.get(ctx, c.d, "")
				if err == nil {
					_, err = io.ReadAll(body)
					body.Close()
				}
				if !errors.Is(err, context.Canceled) {
					t.Errorf("the reader got %v", err)
				}
			})
			eventually(t, "the next one is asked", func() bool { return len(c.hops[1].ranges()) == 1 })
			cancel()
			wg.Wait()
			eventually(t, "no request is left", func() bool { return c.pulling() == 0 && c.requests() == 0 })
			if n := len(c.hops[0].ranges()) + len(c.hops[1].ranges()); n != 2 {
				t.Errorf("%d requests were made, want 2", n)
			}
			c.noErrors()
		})
	}
}

// TestWrongBytes: they are never cached, no reader takes them for the blob, and somebody else is asked, once.
func TestWrongBytes(t *testing.T) {
	const size, part = 300_000, 100_000
	b := noise(26, size)
	bad := bytes.Clone(b)
	bad[10]++
	bad[size-10]++
	fromPart := fmt.Sprintf("bytes=%d-", part)
	for name, tc := range map[string]struct {
		says [][]answer
		want [][]string
		ok   bool // the second try brings the blob
	}{
		"of one":               {[][]answer{{other(bad, serve)}, {serve}}, [][]string{{""}, {""}}, true},
		"of one, of no owner":  {[][]answer{{other(bad, serve)}, {busy}, {serve}}, [][]string{{""}, {""}, {""}}, true},
		"of a cut copy":        {[][]answer{{other(b[:part], serve)}, {serve}}, [][]string{{""}, {""}}, true},
		"of a copy that grew":  {[][]answer{{other(append(bytes.Clone(b), 1), serve)}, {serve}}, [][]string{{""}, {""}}, true},
		"the first part":       {[][]answer{{other(bad, endAfter(part))}, {serve}}, [][]string{{""}, {fromPart, ""}}, true},
		"the second part":      {[][]answer{{endAfter(part), serve}, {other(bad, serve)}, {serve}}, [][]string{{""}, {fromPart}, {""}}, true},
		"of who is read last":  {[][]answer{{endAfter(part), serve}, {other(bad, serve), busy}}, [][]string{{"", ""}, {fromPart, ""}}, true},
		"of all":               {[][]answer{{other(bad, serve)}, {other(bad, serve)}, {other(bad, serve)}}, [][]string{{""}, {""}, nil}, false},
		"of the only one":      {[][]answer{{other(bad, serve)}}, [][]string{{""}}, false},
		"a size that is wrong": {[][]answer{{other(append(bytes.Clone(b), 1), endAfter(0)), busy}, {serve}}, [][]string{{"", ""}, {"", "", ""}}, true},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCourse(t, b, tc.says...)
			body, err := c.get(t.Context(), c.d, "")
			var got []byte
			if err == nil {
				got, err = io.ReadAll(body)
				body.Close()
			}
			// Who has got nothing yet when the first try ends gets what the second one brings.
			if err == nil && !(tc.ok && bytes.Equal(got, b)) {
				t.Error("wrong bytes, and a clean end")
			}
			eventually(t, "all pulls are over", func() bool { return c.pulling() == 0 && c.requests() == 0 })
			c.asked(tc.want...)
			if c.cached(c.d) != tc.ok {
				t.Errorf("the blob is cached: %v, want %v", !tc.ok, tc.ok)
			}
			if tc.ok {
				if err := c.whole(b); err != nil {
					t.Errorf("the next reader: %v", err)
				}
				c.asked(tc.want...)
			}
		})
	}
}

// TestWrongBytesOfASmallBlob: nobody gets any of it before all is right, so a reader waits for the second try, and
// hears what is wrong.
func TestWrongBytesOfASmallBlob(t *testing.T) {
	b := noise(29, 10_000)
	bad := bytes.Clone(b)
	bad[9_999]++
	for name, tc := range map[string]struct {
		says [][]answer
		want [][]string // of the first reader, or of all when the second try brings nothing
		ok   bool
	}{
		"of one":                   {[][]answer{{other(bad, serve)}, {serve}}, [][]string{{""}, {""}}, true},
		"of an empty copy":         {[][]answer{{other(nil, serve)}, {serve}}, [][]string{{""}, {""}}, true},
		"of two of three":          {[][]answer{{other(nil, serve)}, {other(bad, serve)}, {serve}}, [][]string{{""}, {""}, nil}, false},
		"of a cut copy":            {[][]answer{{other(b[:5_000], serve)}, {serve}}, [][]string{{""}, {""}}, true},
		"of a copy that grew":      {[][]answer{{other(append(bytes.Clone(b), 1), serve)}, {serve}}, [][]string{{""}, {""}}, true},
		"of all":                   {[][]answer{{other(bad, serve)}, {other(bad, serve)}}, [][]string{{""}, {""}}, false},
		"of the only one":          {[][]answer{{other(bad, serve)}}, [][]string{{""}}, false},
		"of the one that is there": {[][]answer{{other(bad, serve)}, {busy}}, [][]string{{""}, {"", ""}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCourse(t, b, tc.says...)
			if tc.ok {
				var wg sync.WaitGroup
				for range 4 {
					wg.Go(func() {
						if err := c.whole(b); err != nil {
							t.Error(err)
						}
					})
				}
				wg.Wait()
				c.asked(tc.want...)
				return
			}
			_, err := c.get(t.Context(), c.d, "")
			if err == nil {
				t.Error("wrong bytes, and a clean answer")
			}
			c.asked(tc.want...)
			for _, rg := range []string{"", "100-199"} {
				body, err := c.get(t.Context(), c.d, rg)
				if err == nil {
					t.Errorf("Range %q: wrong bytes, and a clean answer", rg)
					body.Close()
				} else if !strings.HasPrefix(err.Error(), "status 503,") {
					t.Errorf("Range %q: %v, want status 503", rg, err)
				}
			}
			if c.cached(c.d) {
				t.Error("wrong bytes are in the cache")
			}
		})
	}
}

// TestHeldBlob: up to heldWhole a blob is sent once all of it is there, and above that as it comes; either way it is
// the same to who reads.
func TestHeldBlob(t *testing.T) {
	for _, size := range []int{0, 1, 2, heldWhole, heldWhole + 1} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			b := noise(31, size)
			c := newCourse(t, b, []answer{serve})
			if size > 1 {
				body, err := c.get(t.Context(), c.d, fmt.Sprintf("%d-", size/2))
				if err != nil {
					t.Fatal(err)
				}
				if got, err := io.ReadAll(body); err != nil || !bytes.Equal(got, b[size/2:]) {
					t.Errorf("of the second half came %d bytes and %v", len(got), err)
				}
				body.Close()
			}
			if err := c.whole(b); err != nil {
				t.Error(err)
			}
			eventually(t, "it is cached", func() bool { return c.cached(c.d) && c.pulling() == 0 })
			if got := c.metric("kraken_agent_origin_http_bytes_total", nil); got != float64(size) {
				t.Errorf("%v bytes were taken, want %d", got, size)
			}
			c.noErrors()
		})
	}
}

// TestPullEndsBeforeItIsJoined: who saw no blob in the cache, and comes when the pull that brings it has ended, begins
// no other.
func TestPullEndsBeforeItIsJoined(t *testing.T) {
	b := noise(35, 10_000)
	c := newCourse(t, b, []answer{serve})
	if err := c.whole(b); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pull is over", func() bool { return c.cached(c.d) && c.pulling() == 0 })
	p, wait, err := c.join(t.Context(), "r", c.d, notCached)
	if p != nil || err != nil {
		t.Fatalf("joined %v, and %v", p, err)
	}
	select {
	case <-wait:
	default:
		t.Error("it is to wait")
	}
	c.asked([]string{""})
}

// TestHeldBlobWithoutReaders: of which most is there, it is fetched to its end when its last reader goes away.
func TestHeldBlobWithoutReaders(t *testing.T) {
	for part, finished := range map[int]bool{40_000: true, 20_000: false} {
		t.Run(fmt.Sprint(part), func(t *testing.T) {
			b := noise(32, 60_000)
			c := newCourse(t, b, []answer{hangAfter(part)}, []answer{serve})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var wg sync.WaitGroup
			wg.Go(func() {
				if body, err := c.get(ctx, c.d, ""); err == nil {
					t.Error("headers came before the blob was verified")
					body.Close()
				}
			})
			eventually(t, "a part is there", func() bool { return c.missing(c.d) == int64(len(b)-part) })
			cancel()
			wg.Wait()
			eventually(t, "the pull is over", func() bool { return c.pulling() == 0 })
			if c.cached(c.d) != finished {
				t.Errorf("it is cached: %v, want %v", !finished, finished)
			}
			c.noErrors()
		})
	}
}

// TestHeldBlobHasNoRoom: it comes all the same, and is not cached.
func TestHeldBlobHasNoRoom(t *testing.T) {
	b := noise(33, 10_000)
	c := newCourseWith(t, Config{Cache: Cache{Capacity: 1000}}, b, []answer{serve, serve})
	if err := c.whole(b); err != nil {
		t.Error(err)
	}
	if c.cached(c.d) {
		t.Error("it is cached")
	}
}

// TestHeldBlobOfAnAgentThatEnds: who waits is told to come back.
func TestHeldBlobOfAnAgentThatEnds(t *testing.T) {
	c := newCourse(t, noise(34, 10_000), []answer{hang})
	var wg sync.WaitGroup
	wg.Go(func() {
		if body, err := c.get(t.Context(), c.d, ""); err == nil {
			body.Close()
			t.Error("it was sent")
		} else if !strings.HasPrefix(err.Error(), "status 503,") {
			t.Errorf("%v, want status 503", err)
		}
	})
	eventually(t, "the origin is asked", func() bool { return len(c.hops[0].ranges()) == 1 })
	c.stop()
	wg.Wait()
}

// TestWrongBytesNextReader: who comes back as soon as the wrong bytes broke off gets the right ones, from the second
// try.
func TestWrongBytesNextReader(t *testing.T) {
	b := noise(27, 1<<20)
	bad := bytes.Clone(b)
	bad[0]++
	c := newCourse(t, b, []answer{other(bad, serve)}, []answer{serve})
	if err := c.whole(b); err == nil {
		t.Log("the first reader was so late that it got the right bytes of the second try") // whole has compared them
	}
	if err := c.whole(b); err != nil {
		t.Errorf("the next reader: %v", err)
	}
	c.asked([]string{""}, []string{""})
}

// TestPulledOverHTTPIsSeeded: a blob that came over HTTP, because no origin had its metainfo, is announced, and peers
// can have it.
func TestPulledOverHTTPIsSeeded(t *testing.T) {
	b := noise(28, 3<<20)
	c := newCourse(t, b, []answer{serve})
	if err := c.whole(b); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the blob is one to announce", func() bool {
		l := c.lately()
		return len(l) == 1 && l[0].Digest == c.d
	})
	m, err := c.store.Metainfo(c.d)
	if err != nil {
		t.Fatal(err)
	}
	st, err := store.Open(store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	peer, err := swarm.New(swarm.Config{Listen: "127.0.0.1:0", Store: st})
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	part, err := st.Partial(m)
	if err != nil {
		t.Fatal(err)
	}
	defer part.Close()
	f, err := peer.Fetch(t.Context(), swarm.Request{Partial: part, Peers: []swarm.Peer{{ID: c.swarm.PeerID(), Addr: c.swarm.Addr()}}})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	select {
	case <-f.Done():
		if err := f.Err(); err != nil {
			t.Errorf("a peer: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("a peer does not get the blob")
	}
}

// TestWhatCantBeSeededIsNotAnnounced: a blob without metainfo, which was small when it was pulled, before small_blob
// was lowered.
func TestWhatCantBeSeededIsNotAnnounced(t *testing.T) {
	b := noise(29, 3<<20)
	c := newCourse(t, b, []answer{serve})
	u, err := c.store.NewUpload(store.UploadOptions{Size: int64(len(b)), NoMetainfo: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.Write(t.Context(), 0, bytes.NewReader(b)); err != nil {
		t.Fatal(err)
	}
	if _, err := u.Commit(t.Context(), c.d, nil); err != nil {
		t.Fatal(err)
	}
	if l := c.lately(); len(l) > 0 {
		t.Errorf("%v are announced, and peers that ask are refused", l)
	}
}

// TestManifestFromOrigins: while build-index is down a manifest comes from whichever origin delivers, too.
func TestManifestFromOrigins(t *testing.T) {
	b := []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json"}`)
	bad := bytes.ToUpper(b)
	for name, tc := range map[string]struct {
		says   [][]answer
		status int
	}{
		"one is silent":            {[][]answer{{hang}, {serve}}, http.StatusOK},
		"one is silent midway":     {[][]answer{{hangAfter(10)}, {serve}}, http.StatusOK},
		"one has other bytes":      {[][]answer{{other(bad, serve)}, {serve}}, http.StatusOK},
		"all have other bytes":     {[][]answer{{other(bad, serve)}, {other(bad, serve)}}, http.StatusServiceUnavailable},
		"one has a large one":      {[][]answer{{other(make([]byte, registry.MaxManifest+1), serve)}, {serve}}, http.StatusServiceUnavailable},
		"nobody knows it":          {[][]answer{{unknown}, {unknown}}, http.StatusServiceUnavailable},
		"one has none, one has it": {[][]answer{{unknown}, {serve}}, http.StatusOK},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCourseWith(t, silentFor(shortStall), b, tc.says...)
			resp, err := http.Get(fmt.Sprintf("http://%s/v2/demo/app/manifests/%s", c.Addr(), c.d))
			if err != nil {
				t.Fatal(err)
			}
			defer http.DefaultClient.CloseIdleConnections()
			defer resp.Body.Close()
			raw, err := io.ReadAll(resp.Body)
			if err != nil || resp.StatusCode != tc.status {
				t.Errorf("status %d, want %d: %s, %v", resp.StatusCode, tc.status, raw, err)
			}
			if tc.status == http.StatusOK && !bytes.Equal(raw, b) {
				t.Errorf("got %s", raw)
			}
		})
	}
}
