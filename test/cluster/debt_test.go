package cluster

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/origin"
	"kraken/origin/bucket"
	"kraken/proto/cluster"
	"kraken/proto/config"
	"kraken/proto/layout"
	"kraken/proto/registry"
	"kraken/proto/ring"
)

// fleet is the origins of a cluster, to be spoken to one by one.
type fleet struct {
	t     *testing.T
	c     *Cluster
	names []string
	parts map[string]*Part
	at    map[string]*cluster.OriginClient
	ring  *ring.Ring
}

func newFleet(t *testing.T, origins int) *fleet {
	c := NewOrigins(t, origins, 0)
	f := &fleet{t: t, c: c, parts: map[string]*Part{}, at: map[string]*cluster.OriginClient{}}
	for i, p := range c.Origins {
		f.names = append(f.names, p.name)
		f.parts[p.name], f.at[p.name] = p, originClient(t, c.OriginURLs[i])
	}
	f.ring = ring.New(f.names, 2)
	return f
}

// push makes some origins commit a blob as a proxy does, at each of them.
func (f *fleet) push(repo string, b []byte, origins ...string) digest.Digest {
	f.t.Helper()
	d := digest.FromBytes(b)
	for _, name := range origins {
		o := f.at[name]
		u, err := o.StartUpload(f.t.Context(), repo, registry.UploadOptions{Size: -1})
		if err == nil {
			_, err = o.CommitUpload(f.t.Context(), repo, u.ID, d, registry.Chunk{Offset: 0, Length: int64(len(b)), Body: bytes.NewReader(b)})
		}
		if err != nil {
			f.t.Fatalf("push to %s: %v", name, err)
		}
	}
	return d
}

// blobs returns n blobs whose owners are the first two of names, in any order.
func (f *fleet) blobs(n int, owners ...string) (out [][]byte) {
	for seed := 0; len(out) < n; seed++ {
		b := noise(20_000, byte(seed))
		copy(b, fmt.Sprintf("%d of %v", seed, owners))
		d := digest.FromBytes(b)
		if f.ring.Owns(owners[0], d) && f.ring.Owns(owners[1], d) {
			out = append(out, b)
		}
	}
	return out
}

func (f *fleet) bucketConfig() bucket.Config {
	return bucket.Config{
		Name: "testfs", URL: "s3://kraken?region=us-east-1&use_path_style=true&endpoint=http://" + f.c.Bucket.Addr(),
		AccessKey: config.NewSecret("dev"), SecretKey: config.NewSecret("dev"),
	}
}

// bucket is the cluster's.
func (f *fleet) bucket() bucket.Bucket {
	f.t.Helper()
	b, err := bucket.Open(f.t.Context(), f.bucketConfig(), nil)
	if err != nil {
		f.t.Fatal(err)
	}
	return b
}

// settled waits until no origin owes anything.
func (f *fleet) settled() {
	f.t.Helper()
	Eventually(f.t, time.Minute, func() error { return f.c.owed(f.names...) })
}

// wantStored says which of the blobs are not in the bucket, bytes and links.
func (f *fleet) wantStored(repo string, blobs [][]byte) {
	f.t.Helper()
	b := f.bucket()
	for i, want := range blobs {
		d := digest.FromBytes(want)
		r, err := b.Open(f.t.Context(), layout.BlobKey(d), 0, -1)
		if err != nil {
			f.t.Errorf("blob %d: %v", i, err)
			continue
		}
		got, err := io.ReadAll(r)
		r.Close()
		if err != nil || !bytes.Equal(got, want) {
			f.t.Errorf("blob %d is in the bucket as %d other bytes, %v", i, len(got), err)
		}
		if _, err := b.Stat(f.t.Context(), layout.LayerLink(repo, d)); err != nil {
			f.t.Errorf("blob %d has no link of %s: %v", i, repo, err)
		}
	}
}

// empty waits until an origin holds none of the blobs.
func (f *fleet) empty(name string, blobs [][]byte) {
	f.t.Helper()
	Eventually(f.t, time.Minute, func() error {
		for _, b := range blobs {
			if _, err := f.at[name].LocalStat(f.t.Context(), "demo/x", digest.FromBytes(b)); !errors.Is(err, registry.ErrBlobUnknown) {
				return fmt.Errorf("%s still has %s (%v)", name, digest.FromBytes(b), err)
			}
		}
		return nil
	})
}

// wipe ends an origin, takes its disk away, and starts it again.
func (f *fleet) wipe(name string) {
	f.t.Helper()
	f.parts[name].Stop()
	if err := os.RemoveAll(f.c.StateDir(name)); err != nil {
		f.t.Fatal(err)
	}
	f.parts[name].Start()
}

// An owner that has copied a blob for a reader owes nothing by that. The others hand their debt over before they drop
// theirs, so that any one disk may be lost.
func TestACopyWithoutDebtIsNoSecondOne(t *testing.T) {
	f := newFleet(t, 3)
	reader, owner, other := f.names[0], f.names[1], f.names[2]
	blobs := f.blobs(6, reader, owner)
	f.c.Bucket.SetDown(true)
	f.parts[reader].Stop()
	for _, b := range blobs {
		f.push("demo/x", b, owner, other)
	}
	f.parts[reader].Start()
	for _, b := range blobs { // which makes it copy the blob
		wantBlob(t, f.at[reader].Client, "demo/x", b)
	}
	f.empty(other, blobs)
	f.wipe(owner)
	f.c.Bucket.SetDown(false)
	f.settled()
	f.wantStored("demo/x", blobs)
}

// What is pushed to a second repository through origins that don't own it keeps that repository's name on the way to
// the owners, which have the blob already.
func TestDebtsAreMerged(t *testing.T) {
	f := newFleet(t, 4)
	blobs := f.blobs(5, f.names[0], f.names[1])
	f.c.Bucket.SetDown(true)
	for _, b := range blobs {
		f.push("demo/first", b, f.names[0], f.names[1])
	}
	for _, b := range blobs {
		f.push("demo/second", b, f.names[2], f.names[3])
	}
	f.empty(f.names[2], blobs)
	f.empty(f.names[3], blobs)
	f.c.Bucket.SetDown(false)
	f.settled()
	f.wantStored("demo/first", blobs)
	f.wantStored("demo/second", blobs)
}

// An audit tells what is in the bucket, what is owed by two, and what neither is.
func TestAudit(t *testing.T) {
	f := newFleet(t, 3)
	cfg := origin.Config{ID: f.names[0], Dir: t.TempDir()}
	for i, name := range f.names {
		cfg.Origins = append(cfg.Origins, ring.Member{ID: name, URL: f.c.OriginURLs[i], Peer: "127.0.0.1:1"})
	}
	cfg.Replicas = 2
	cfg.Buckets = []bucket.Config{f.bucketConfig()}
	audit := func(want origin.AuditReport) {
		t.Helper()
		var out bytes.Buffer
		got, err := origin.Audit(t.Context(), cfg, origin.AuditOptions{BuildIndex: "http://" + f.c.find("build-index").Addr}, &out)
		var found *origin.AuditError
		if got != want || (err != nil) != errors.As(err, &found) || (err != nil) != (want.Missing+want.Unknown > 0) {
			t.Errorf("%+v, %v, want %+v; it says:\n%s", got, err, want, &out)
		}
		if lines := strings.Count(out.String(), "\n"); lines != want.Missing+want.Unknown {
			t.Errorf("%d lines, want one for each that is missing:\n%s", lines, &out)
		}
		if found != nil && want.Missing > 0 && found.ExitCode() != 1 {
			t.Errorf("exit code %d, want 1", found.ExitCode())
		}
	}
	push := func(b []byte, repo string) digest.Digest {
		t.Helper()
		if err := pushBlob(t.Context(), f.c.Proxy, repo, b); err != nil {
			t.Fatal(err)
		}
		return digest.FromBytes(b)
	}
	blobs := f.blobs(4, f.names[0], f.names[1])
	first := push(blobs[0], "demo/one")
	f.settled()
	f.c.Bucket.SetDown(true)
	push(blobs[1], "demo/one")
	push(blobs[2], "demo/two")
	f.c.Bucket.SetDown(false)
	f.settled()
	audit(origin.AuditReport{Repositories: 2, Members: 3, InBucket: 3})
	for _, p := range f.c.Origins { // nobody writes back in what follows
		p.Stop()
	}
	if err := f.bucket().Delete(t.Context(), layout.BlobKey(first)); err != nil {
		t.Fatal(err)
	}
	wrong := bytes.Clone(blobs[1])
	wrong[3] ^= 1
	if err := f.bucket().Put(t.Context(), layout.BlobKey(digest.FromBytes(blobs[1])), bytes.NewReader(wrong)); err != nil {
		t.Fatal(err)
	}
	audit(origin.AuditReport{Repositories: 2, Members: 3, InBucket: 1, Unknown: 2})
	for _, p := range f.c.Origins {
		p.Start()
	}
	audit(origin.AuditReport{Repositories: 2, Members: 3, InBucket: 1, Missing: 2})
}
