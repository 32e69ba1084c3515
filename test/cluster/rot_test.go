package cluster

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"

	"kraken/proto/layout"
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
