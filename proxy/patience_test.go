package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/ring"
	"kraken/proto/transport"
	"kraken/test/pipes"
)

const testStall = 5 * time.Second

// proxyOf returns a proxy of origins with these handlers, o1 and so on, and of a build-index where every blob of
// content is a member. It is called in a bubble.
func proxyOf(t *testing.T, hs ...http.HandlerFunc) *Proxy {
	t.Helper()
	dial := map[string]transport.DialFunc{}
	serve := func(host string, h http.HandlerFunc) string {
		dial[host+":80"] = pipes.Serve(t, h).DialContext
		return "http://" + host
	}
	var members []ring.Member
	for i, h := range hs {
		id := fmt.Sprint("o", i+1)
		members = append(members, ring.Member{ID: id, URL: serve(id, h)})
	}
	hc, err := transport.NewClient(transport.ClientConfig{Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
		return dial[addr](ctx, network, addr)
	}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hc.CloseIdleConnections)
	o, err := cluster.NewOrigins(members, len(members), testStall, hc)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.Close)
	index, err := cluster.NewIndexClient(serve("index", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(cluster.Layer{Digest: digest.FromString(content), Size: int64(len(content))})
	}), hc)
	if err != nil {
		t.Fatal(err)
	}
	return &Proxy{
		origins: o, index: index, stall: testStall, originPatience: 2 * testStall, replicas: len(members), ids: newSigner("one key"),
		m: newMetrics(prometheus.NewRegistry()), log: slog.New(slog.DiscardHandler), doubts: newDoubts(),
	}
}

// content is the blob that the origins of these tests have.
const content = "a layer"

// hangs is an origin that takes what it is sent and does not answer.
func hangs(_ http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body) // the end of a client shows once its body was read
	<-r.Context().Done()
}

// stands is an origin whose session has n bytes.
func stands(n int64, after time.Duration) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(after)
		if strings.HasSuffix(r.URL.Path, "/v2/") {
			return
		}
		w.Header().Set("Location", r.URL.Path)
		w.Header().Set("Range", fmt.Sprintf("0-%d", n-1))
		w.WriteHeader(http.StatusNoContent)
	}
}

// session returns an upload with a copy at each origin.
func (p *Proxy) testSession() string {
	s := session{V: sessionVersion, Repo: "a"}
	for _, o := range p.origins.All() {
		s.S = append(s.S, part{o.ID, someUUID})
	}
	return p.ids.seal(s)
}

// A question about an upload, and its end, wait for an origin that hangs as long as for one elsewhere. It is left out
// of what goes on, and asked last from then on.
func TestUploadOfAnOriginThatHangs(t *testing.T) {
	const quick = time.Millisecond
	for _, tt := range []struct {
		name           string
		origins        [2]http.HandlerFunc
		status, cancel time.Duration // that they take
		left           []string      // in the session, none: 503
	}{
		{"none", [2]http.HandlerFunc{stands(7, quick), stands(7, quick)}, quick, quick, []string{"o1", "o2"}},
		{"the first", [2]http.HandlerFunc{hangs, stands(7, quick)}, quick + testStall/5, testStall, []string{"o2"}},
		{"the second", [2]http.HandlerFunc{stands(7, quick), hangs}, quick + testStall/5, testStall, []string{"o1"}},
		{"both", [2]http.HandlerFunc{hangs, hangs}, testStall, testStall, nil},
		{"one is slow", [2]http.HandlerFunc{stands(7, 4*time.Second), stands(7, 4*time.Second+900*time.Millisecond)},
			4*time.Second + 900*time.Millisecond, 4*time.Second + 900*time.Millisecond, []string{"o1", "o2"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ask := func(what string, want time.Duration, f func(p *Proxy, id string) error) {
					t.Helper()
					p := proxyOf(t, tt.origins[0], tt.origins[1])
					began := time.Now()
					err := f(p, p.testSession())
					if took := time.Since(began); took < want || took > want+100*time.Millisecond {
						t.Errorf("%s took %s, want %s", what, took, want)
					}
					if (err == nil) != (tt.left != nil) || err != nil && !errors.Is(err, registry.ErrUnavailable) {
						t.Errorf("%s: %v", what, err)
					}
					for _, o := range p.origins.All() {
						if o.Answers() != slices.Contains(tt.left, o.ID) {
							t.Errorf("after %s %s is taken for one that answers: %t", what, o.ID, o.Answers())
						}
					}
				}
				ask("status", tt.status, func(p *Proxy, id string) error {
					u, err := p.UploadStatus(t.Context(), "a", id)
					if err != nil {
						return err
					}
					s, err := p.ids.unseal(u.ID)
					var left []string
					for _, c := range s.S {
						left = append(left, c.Origin)
					}
					if u.Offset != 7 || fmt.Sprint(left) != fmt.Sprint(tt.left) {
						t.Errorf("%d bytes at %v, want 7 at %v", u.Offset, left, tt.left)
					}
					return err
				})
				ask("cancel", tt.cancel, func(p *Proxy, id string) error { return p.AbortUpload(t.Context(), "a", id) })
			})
		})
	}
}

// An origin that hangs holds up nothing that another has refused, and one that is slow is waited for: it may have the
// only copy.
func TestCommitThatIsRefused(t *testing.T) {
	answer := func(status int, code string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.Method != http.MethodPut {
				stands(7, 0)(w, r)
				return
			}
			w.Header().Set("Location", r.URL.Path)
			w.Header().Set("Range", "0-6")
			w.WriteHeader(status)
			fmt.Fprintf(w, `{"errors":[{"code":%q,"message":"no"}]}`, code)
		}
	}
	slow := func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			_, _ = io.Copy(io.Discard, r.Body)
			time.Sleep(20 * time.Second)
		}
		answer(http.StatusBadRequest, "DIGEST_INVALID")(w, r)
	}
	for _, tt := range []struct {
		name   string
		first  http.HandlerFunc
		second http.HandlerFunc
		want   error
		took   time.Duration
	}{
		{"another digest", hangs, answer(http.StatusBadRequest, "DIGEST_INVALID"), registry.ErrDigestInvalid, testStall},
		{"out of order", hangs, answer(http.StatusRequestedRangeNotSatisfiable, "BLOB_UPLOAD_INVALID"), registry.ErrRangeInvalid, testStall + testStall/5},
		{"a full disk", hangs, answer(http.StatusInsufficientStorage, "INSUFFICIENT_STORAGE"), registry.ErrStorageFull, testStall},
		{"an unknown session", hangs, answer(http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN"), registry.ErrBlobUploadUnknown, testStall},
		{"an origin that ends", hangs, answer(http.StatusServiceUnavailable, "UNAVAILABLE"), registry.ErrUnavailable, testStall},
		{"the other is slow", slow, answer(http.StatusServiceUnavailable, "UNAVAILABLE"), registry.ErrDigestInvalid, 20 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := proxyOf(t, tt.first, tt.second)
				began := time.Now()
				_, err := p.CommitUpload(t.Context(), "a", p.testSession(), digest.FromString("layer"), registry.Chunk{Offset: -1, Length: 5, Body: strings.NewReader("layer")})
				if took := time.Since(began); !errors.Is(err, tt.want) || took < tt.took || took > tt.took+100*time.Millisecond {
					t.Errorf("%v after %s, want %v after %s", err, took, tt.want, tt.took)
				}
			})
		})
	}
}

// A read waits origin_patience for its first byte, however its tries go, and then as long as bytes come.
func TestReadThatWaits(t *testing.T) {
	after := func(d time.Duration, h http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			select {
			case <-time.After(d):
				h(w, r)
			case <-r.Context().Done():
			}
		}
	}
	away := func(w http.ResponseWriter, r *http.Request) { registry.WriteError(w, r, registry.ErrUnavailable) }
	slowly := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		w.WriteHeader(http.StatusOK)
		for i := range len(content) {
			_ = http.NewResponseController(w).Flush()
			time.Sleep(4 * time.Second)
			_, _ = io.WriteString(w, content[i:i+1])
		}
	}
	for _, tt := range []struct {
		name    string
		origins []http.HandlerFunc
		min     time.Duration // that the answer takes, at most patience
		want    error
	}{
		{"all hang", []http.HandlerFunc{hangs, hangs, hangs}, 2 * testStall, registry.ErrUnavailable},
		{"one that hangs", []http.HandlerFunc{hangs}, 2 * testStall, registry.ErrUnavailable},
		{"a bucket that hangs", []http.HandlerFunc{after(4*time.Second, away), after(4*time.Second, away), after(4*time.Second, away)}, 2 * testStall, registry.ErrUnavailable},
		{"a bucket that is away", []http.HandlerFunc{away, away, away}, testStall, registry.ErrUnavailable},
		{"one that is slow", []http.HandlerFunc{after(8*time.Second, slowly)}, 8 * time.Second, nil},
		{"one that is slow, one that hangs", []http.HandlerFunc{after(4*time.Second, slowly), hangs}, 4 * time.Second, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := proxyOf(t, tt.origins...)
				began := time.Now()
				c, err := p.OpenBlob(t.Context(), "a", digest.FromString(content), registry.Whole)
				if took := time.Since(began); !errors.Is(err, tt.want) || took < tt.min || took > p.originPatience {
					t.Errorf("%v after %s, want %v after %s to %s", err, took, tt.want, tt.min, p.originPatience)
				}
				var again *registry.RetryError
				if err != nil {
					if !errors.As(err, &again) {
						t.Errorf("%v does not say when to ask again", err)
					}
					return
				}
				if got, err := io.ReadAll(c.Body); string(got) != content || err != nil {
					t.Errorf("read %q after %s: %v", got, time.Since(began), err)
				}
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}
