package origin

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/registry"
	"kraken/proto/ring"
)

// among runs an origin beside two others: one that has nothing, and one that answers nothing.
func among(t *testing.T, change ...func(*Config)) (*Origin, *cluster.OriginClient) {
	t.Helper()
	other := func(h http.HandlerFunc) string {
		s := httptest.NewServer(h)
		t.Cleanup(s.Close)
		return s.URL
	}
	empty := other(func(w http.ResponseWriter, r *http.Request) { registry.WriteError(w, r, registry.ErrBlobUnknown) })
	silent := other(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	return alone(t, append(change, func(cfg *Config) {
		cfg.Replicas, cfg.Origins = 2, []ring.Member{{ID: "origin-01", URL: "http://127.0.0.1:1"}, {ID: "origin-02", URL: empty}, {ID: "origin-03", URL: silent}}
	})...)
}

// intoBucket puts a blob and its metainfo into the origin's bucket, and only there.
func intoBucket(t *testing.T, o *Origin, b []byte) digest.Digest {
	t.Helper()
	d := digest.FromBytes(b)
	h := blob.NewPieceHasher(int64(len(b)))
	_, _ = h.Write(b) // never fails
	m, err := h.Sum(d)
	if err != nil {
		t.Fatal(err)
	}
	_, bucket, ok := o.buckets.For("demo/app")
	if !ok {
		t.Fatal("no bucket")
	}
	for key, b := range map[string][]byte{layout.BlobKey(d): b, layout.MetainfoKey(d): m.Marshal()} {
		if err := bucket.Put(t.Context(), key, bytes.NewReader(b)); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

// TestOnlyInTheBucketBesideASilentOrigin: a blob that the bucket alone has is given while another origin answers
// nothing, in less time than any role has patience with the one that it asks, and the next one at once.
func TestOnlyInTheBucketBesideASilentOrigin(t *testing.T) {
	for name, ask := range map[string]func(ctx context.Context, c *cluster.OriginClient, d digest.Digest, b []byte) error{
		"stat": func(ctx context.Context, c *cluster.OriginClient, d digest.Digest, _ []byte) error {
			_, err := c.StatBlob(ctx, "demo/app", d)
			return err
		},
		"open": func(ctx context.Context, c *cluster.OriginClient, d digest.Digest, b []byte) error {
			content, err := c.OpenBlob(ctx, "demo/app", d, registry.Whole)
			if err != nil {
				return err
			}
			defer content.Close()
			got, err := io.ReadAll(content.Reader())
			if err == nil && !bytes.Equal(got, b) {
				t.Errorf("%d other bytes", len(got))
			}
			return err
		},
		"arriving": func(ctx context.Context, c *cluster.OriginClient, d digest.Digest, _ []byte) error {
			_, err := c.Arriving(ctx, "demo/app", d, cluster.ArrivingRequest{})
			return err
		},
		"metainfo": func(ctx context.Context, c *cluster.OriginClient, d digest.Digest, _ []byte) error {
			_, err := c.Metainfo(ctx, "demo/app", d)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o, c := among(t)
			for i := range 2 {
				b := bytes.Repeat([]byte{byte(i), 'b'}, 100_000)
				d := intoBucket(t, o, b)
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				if err := ask(ctx, c, d, b); err != nil {
					t.Errorf("blob %d: %v", i, err)
				}
			}
			if o.origins.Get("origin-03").Answers() {
				t.Error("the silent origin is thought to answer")
			}
		})
	}
}

// TestNowhereBesideASilentOrigin: what no other place has may be at the origin that is silent, so that it is not 404.
func TestNowhereBesideASilentOrigin(t *testing.T) {
	_, c := among(t)
	for range 2 {
		if _, err := c.StatBlob(t.Context(), "demo/app", digest.FromString("nowhere")); !errors.Is(err, registry.ErrUnavailable) {
			t.Errorf("%v, want %v", err, registry.ErrUnavailable)
		}
	}
}

// TestNextWhereOneHasLostIt: where an origin says that it has a blob, and does not give it, the next one does.
func TestNextWhereOneHasLostIt(t *testing.T) {
	b := bytes.Repeat([]byte("a layer "), 1000)
	gives := func(get bool) string {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodGet && !get {
				registry.WriteError(w, r, registry.ErrBlobUnknown)
				return
			}
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
		}))
		t.Cleanup(s.Close)
		return s.URL
	}
	for i, urls := range [][2]string{{gives(false), gives(true)}, {gives(true), gives(false)}} {
		_, c := alone(t, func(cfg *Config) {
			cfg.Replicas, cfg.Origins = 2, []ring.Member{{ID: "origin-01", URL: "http://127.0.0.1:1"}, {ID: "origin-02", URL: urls[0]}, {ID: "origin-03", URL: urls[1]}}
		})
		content, err := c.OpenBlob(t.Context(), "demo/app", digest.FromBytes(b), registry.Whole)
		if err != nil {
			t.Errorf("order %d: %v", i, err)
			continue
		}
		got, err := io.ReadAll(content.Reader())
		if err = errors.Join(err, content.Close()); err != nil || !bytes.Equal(got, b) {
			t.Errorf("order %d: %d bytes, %v", i, len(got), err)
		}
	}
}
