package cluster

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/layout"
	"kraken/proto/registry"
)

// rot flips a bit of a blob's file.
func rot(folder string) error {
	f, err := os.OpenFile(filepath.Join(folder, "data"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	b := []byte{0}
	_, err = f.ReadAt(b, 100)
	if err == nil {
		b[0] ^= 1
		_, err = f.WriteAt(b, 100)
	}
	return errors.Join(err, f.Close())
}

// A bit that flips before write-back does not get into the bucket: the good copy of the other owner does, and the wrong
// one is replaced by it.
func TestRotDoesNotReachTheBucket(t *testing.T) {
	f := newFleet(t, 3)
	blobs := f.blobs(4, f.names[0], f.names[1])
	f.c.Bucket.SetDown(true)
	for i, b := range blobs {
		d := f.push("demo/rot", b, f.names[0], f.names[1])
		f.c.harm(f.names[i%2], d, rot)
	}
	f.c.Bucket.SetDown(false)
	f.settled()
	f.wantStored("demo/rot", blobs)
	for _, name := range f.names[:2] {
		for _, b := range blobs { // small ones are hashed as they are read
			wantBlob(t, f.at[name].Client, "demo/rot", b)
		}
	}
}

// An object in the bucket that is not what its key says is replaced by the next push of the blob, whatever its size.
func TestWrongObjectIsReplaced(t *testing.T) {
	f := newFleet(t, 3)
	blobs := f.blobs(2, f.names[0], f.names[1])
	b := f.bucket()
	for i, want := range blobs {
		wrong := bytes.Clone(want[:len(want)-i])
		wrong[7] ^= 1
		if err := b.Put(t.Context(), layout.BlobKey(digest.FromBytes(want)), bytes.NewReader(wrong)); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range blobs {
		f.push("demo/wrong", want, f.names[0], f.names[1])
	}
	f.settled()
	f.wantStored("demo/wrong", blobs)
	if o, err := b.Stat(t.Context(), layout.BlobKey(digest.FromBytes(blobs[0]))); err != nil || o.Digest != digest.FromBytes(blobs[0]) {
		t.Errorf("S3 keeps no digest: %+v, %v", o, err)
	}
}

// rotten makes every origin's copy of a blob wrong, and says at how many.
func (c *Cluster) rotten(d digest.Digest, do func(folder string) error) (n int) {
	for _, p := range c.Origins {
		if c.harm(p.name, d, do) {
			n++
		}
	}
	return n
}

// A rotten file is served to nobody for long: who meets it makes its holder verify it, and fetch it again.
func TestRotIsNoticedByReaders(t *testing.T) {
	c := New(t, 1)
	same := func(r *registry.Client, b []byte) func() error {
		return func() error {
			got, err := readBlob(t.Context(), r, "demo/rot", digest.FromBytes(b))
			if err == nil && !bytes.Equal(got, b) {
				err = fmt.Errorf("%d other bytes", len(got))
			}
			return err
		}
	}
	push := func(size int, seed byte) ([]byte, digest.Digest) {
		b := noise(size, seed)
		if err := pushBlob(t.Context(), c.Proxy, "demo/rot", b); err != nil {
			t.Fatal(err)
		}
		writtenBack(t, c)
		Eventually(t, 30*time.Second, func() error { // who took the push and is no owner has left it
			n := c.rotten(digest.FromBytes(b), func(string) error { return nil })
			if n != 2 {
				return fmt.Errorf("%d origins have it", n)
			}
			return nil
		})
		return b, digest.FromBytes(b)
	}
	t.Run("a small one at the origins, by a proxy", func(t *testing.T) {
		b, d := push(30_000, 90)
		c.rotten(d, rot)
		if err := same(c.Proxy, b)(); err != nil {
			t.Error(err)
		}
	})
	t.Run("a large one at the origins, by a client of a proxy that asks again", func(t *testing.T) {
		b, d := push(3_000_000, 91)
		c.rotten(d, rot)
		Eventually(t, 20*time.Second, same(c.Proxy, b))
	})
	t.Run("a large one at the origins, by an agent", func(t *testing.T) {
		b, d := push(3_000_000, 92)
		c.rotten(d, rot)
		Eventually(t, 40*time.Second, same(c.Agents[0], b))
		Eventually(t, 20*time.Second, same(c.Proxy, b))
	})
	t.Run("a large one in an agent's cache, by a runtime that asks again", func(t *testing.T) {
		b, d := push(3_000_000, 93)
		if err := same(c.Agents[0], b)(); err != nil {
			t.Fatal(err)
		}
		if !c.harm("agent-01", d, rot) {
			t.Fatal("the agent has no such blob")
		}
		Eventually(t, 20*time.Second, same(c.Agents[0], b))
	})
	t.Run("short since before the start, by the size of the membership", func(t *testing.T) {
		b, d := push(3_000_000, 94)
		for _, p := range c.Origins {
			p.Stop()
		}
		c.rotten(d, func(folder string) error {
			return errors.Join(os.Truncate(filepath.Join(folder, "data"), 2_000_000), os.Remove(filepath.Join(folder, "metainfo")))
		})
		for _, p := range c.Origins {
			p.Start()
		}
		Eventually(t, 20*time.Second, func() error {
			got, err := readBlob(t.Context(), c.Proxy, "demo/rot", d)
			if err == nil && !bytes.Equal(got, b) {
				t.Fatalf("%d other bytes were served as the blob", len(got))
			}
			return err
		})
	})
}
