package cluster

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/registry"
	"kraken/proto/ring"
	"kraken/proto/transport"
	"kraken/test/pipes"
)

const testStall = 500 * time.Millisecond

// gate is an origin that can be made to hang.
type gate struct {
	http.Handler
	hang atomic.Bool
	asks atomic.Int32
}

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.asks.Add(1)
	if g.hang.Load() {
		<-r.Context().Done()
		return
	}
	g.Handler.ServeHTTP(w, r)
}

// originsOf returns origins with these handlers, over connections in memory.
func originsOf(t *testing.T, hs map[string]http.Handler) *Origins {
	t.Helper()
	var members []ring.Member
	dial := map[string]transport.DialFunc{}
	for id, h := range hs {
		members = append(members, ring.Member{ID: id, URL: "http://" + id})
		dial[id+":80"] = pipes.Serve(t, h).DialContext
	}
	hc, err := transport.NewClient(transport.ClientConfig{Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
		return dial[addr](ctx, network, addr)
	}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	o, err := NewOrigins(members, 2, testStall, hc)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.Close)
	return o
}

// An origin that hangs delays one request by a fifth of the stall timeout. It is not asked first again until it has
// answered, which is found out without a request of anybody's.
func TestHangingOrigin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := digest.FromString("layer")
		gates := map[string]*gate{}
		hs := map[string]http.Handler{}
		for _, id := range []string{"o1", "o2", "o3"} {
			gates[id] = &gate{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Length", "5") })}
			hs[id] = gates[id]
		}
		o := originsOf(t, hs)
		owner := o.Owners(d)[0]
		gates[owner.ID].hang.Store(true)
		began := time.Now()
		if _, err := o.StatBlob(t.Context(), "a", d); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took != testStall/5 {
			t.Errorf("took %s, want %s", took, testStall/5)
		}
		for range 3 { // probes hang, too
			if owner.Answers() || o.For(d)[2] != owner {
				t.Errorf("%s hangs and is not asked last", owner.ID)
			}
			time.Sleep(probeEvery)
		}
		gates[owner.ID].hang.Store(false)
		time.Sleep(2 * probeEvery)
		synctest.Wait()
		if o.For(d)[0] != owner || !owner.Answers() {
			t.Errorf("%s answers again, and is asked after %s", owner.ID, o.For(d)[0].ID)
		}
	})
}

// half is an origin that gives the first half of a blob and then breaks off, or hangs, and goes on hanging.
func half(content []byte, hang bool) http.Handler {
	var hangs atomic.Bool
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if hangs.Load() {
			<-r.Context().Done()
			return
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(content)))
		if r.Method == http.MethodHead {
			return
		}
		if _, err := w.Write(content[:len(content)/2]); err != nil {
			return
		}
		if http.NewResponseController(w).Flush() != nil {
			return
		}
		if hang {
			hangs.Store(true)
			<-r.Context().Done()
		}
		panic(http.ErrAbortHandler)
	})
}

// A reader whose origin breaks off or hangs in the middle goes on at another one, at the same byte.
func TestBodyGoesOnElsewhere(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789"), 100_000)
	d := digest.FromBytes(content)
	whole := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
	})
	for _, hang := range []bool{false, true} {
		t.Run("hangs "+strconv.FormatBool(hang), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ids := ring.New([]string{"o1", "o2"}, 2).Order(d)
				o := originsOf(t, map[string]http.Handler{ids[0]: half(content, hang), ids[1]: whole})
				c, err := o.OpenBlob(t.Context(), "a", d, registry.Whole)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				got, err := io.ReadAll(c.Body)
				if err != nil || !bytes.Equal(got, content) {
					t.Errorf("%d bytes of %d, %v", len(got), len(content), err)
				}
				time.Sleep(2 * deadFor) // and longer than one is asked last that could not be reached
				if hang && o.Get(ids[0]).Answers() {
					t.Errorf("%s hangs and is asked first", ids[0])
				}
			})
		})
	}
}

// Where nobody can go on, the reader is told so and never gets a clean end.
func TestBodyThatNobodyCanFinish(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789"), 100_000)
	d := digest.FromBytes(content)
	o := originsOf(t, map[string]http.Handler{"o1": half(content, false), "o2": half(content, false)})
	c, err := o.OpenBlob(t.Context(), "a", d, registry.Whole)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got, err := io.ReadAll(c.Body); err == nil || len(got) >= len(content) {
		t.Errorf("%d bytes of %d, and no error", len(got), len(content))
	}
}

// Another origin that has another size under the digest is not taken for the same blob.
func TestBodyOfAnotherSize(t *testing.T) {
	content := strings.Repeat("0123456789", 100_000)
	d := digest.FromString(content)
	other := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, strings.NewReader(content+"more"))
	})
	ids := ring.New([]string{"o1", "o2"}, 2).Order(d)
	o := originsOf(t, map[string]http.Handler{ids[0]: half([]byte(content), false), ids[1]: other})
	c, err := o.OpenBlob(t.Context(), "a", d, registry.Whole)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.ReadAll(c.Body); err == nil {
		t.Error("a body was put together of two blobs")
	}
}

// Probes end with the origins.
func TestCloseEndsProbes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := &Origins{probes: newProber()}
		or := &Origin{health: &health{}}
		o.probes.suspect(or)
		o.probes.suspect(or)
		o.Close()
		o.probes.suspect(or) // begins nothing, or the test would not end
	})
}
