package cluster

import (
	"errors"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/registry"
	"kraken/proto/ring"
)

// Every origin answers with the metainfo of a blob that an owner has, also one that owns it not; what nobody has is 404
// at all.
func TestMetainfoFromEveryOrigin(t *testing.T) {
	c := New(t, 0)
	b := noise(300_000, 1)
	d := digest.FromBytes(b)
	if err := pushBlob(t.Context(), c.Proxy, "demo/metainfo", b); err != nil {
		t.Fatal(err)
	}
	writtenBack(t, c)
	names := []string{"origin-01", "origin-02", "origin-03"}
	owners := ring.New(names, 2)
	for i, name := range names {
		o := originClient(t, c.OriginURLs[i])
		Eventually(t, 10*time.Second, func() error {
			m, err := o.Metainfo(t.Context(), "demo/metainfo", d)
			if err == nil && (m.Digest != d || m.Size != int64(len(b))) {
				t.Fatalf("%s (owner: %v) answers %+v", name, owners.Owns(name, d), m)
			}
			return err
		})
		if _, err := o.Metainfo(t.Context(), "demo/metainfo", digest.FromString("nobody has it")); !errors.Is(err, registry.ErrBlobUnknown) {
			t.Errorf("%s: %v, want ErrBlobUnknown", name, err)
		}
	}
}
