package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/config"
	"kraken/proto/registry"
	"kraken/proto/ring"
	"kraken/proto/transport"
)

// fakeOrigin has every blob, of five bytes, or none.
type fakeOrigin struct{ has, down atomic.Bool }

func (o *fakeOrigin) StatBlob(_ context.Context, _ string, d digest.Digest) (v1.Descriptor, error) {
	switch {
	case o.down.Load():
		return v1.Descriptor{}, fmt.Errorf("%w: down on purpose", registry.ErrUnavailable)
	case !o.has.Load():
		return v1.Descriptor{}, fmt.Errorf("%w: %s", registry.ErrBlobUnknown, d)
	}
	return v1.Descriptor{Digest: d, Size: 5}, nil
}

func (o *fakeOrigin) OpenBlob(ctx context.Context, repo string, d digest.Digest, _ registry.Range) (*registry.Content, error) {
	_, err := o.StatBlob(ctx, repo, d)
	return nil, err
}

func (o *fakeOrigin) handler() http.Handler {
	return registry.Server{Dialect: Dialect(), Blobs: o}.Handler()
}

// TestSilentOriginIsAskedLast: also one that answered and then went silent in its body.
func TestSilentOriginIsAskedLast(t *testing.T) {
	d := digest.FromString("x")
	silent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "10")
		w.Write([]byte("12345"))
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}))
	defer silent.Close()
	hc, err := transport.NewClient(transport.ClientConfig{ProgressTimeout: config.Duration(50 * time.Millisecond)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	o, err := NewOrigins([]ring.Member{{ID: "o1", URL: silent.URL}, {ID: "o2", URL: silent.URL}}, 2, time.Minute, hc)
	if err != nil {
		t.Fatal(err)
	}
	first := o.Owners(d)[0]
	body, err := first.OpenBlob(t.Context(), "a", d, registry.Whole)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	if _, err := io.ReadAll(body.Body); !errors.Is(err, transport.ErrNoProgress) {
		t.Errorf("ended with %v, want ErrNoProgress", err)
	}
	if got := o.Owners(d)[0]; got == first {
		t.Errorf("%s is still asked first", first.ID)
	}
}

func TestOriginsWalk(t *testing.T) {
	var members []ring.Member
	stores := map[string]*fakeOrigin{}
	for _, id := range []string{"o1", "o2", "o3"} {
		m := &fakeOrigin{}
		srv := httptest.NewServer(m.handler())
		t.Cleanup(srv.Close)
		members, stores[id] = append(members, ring.Member{ID: id, URL: srv.URL}), m
	}
	o, err := NewOrigins(members, 2, time.Minute, http.DefaultClient)
	if err != nil {
		t.Fatal(err)
	}
	d := digest.FromString("hello")
	owners := o.Owners(d)
	if _, err := o.StatBlob(t.Context(), "a", d); !errors.Is(err, registry.ErrBlobUnknown) {
		t.Errorf("nobody has it: %v", err)
	}
	stores[owners[0].ID].down.Store(true)
	stores[owners[1].ID].has.Store(true)
	if desc, err := o.StatBlob(t.Context(), "a", d); err != nil || desc.Size != 5 {
		t.Errorf("the second owner has it: %+v, %v", desc, err)
	}
	for _, m := range stores {
		m.down.Store(true)
	}
	if _, err := o.StatBlob(t.Context(), "a", d); !errors.Is(err, registry.ErrUnavailable) {
		t.Errorf("all are down: %v", err)
	}
	if _, err := NewOrigins(append(members, members[0]), 2, time.Minute, http.DefaultClient); err == nil {
		t.Error("an id that is there twice was taken")
	}
}
