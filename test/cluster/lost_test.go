package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/cluster"
	"kraken/proto/ring"
)

// harms are what somebody else may do to a blob's folder under a running process.
var harms = map[string]func(folder string) error{
	"folder removed": os.RemoveAll,
	"file removed":   func(f string) error { return os.Remove(filepath.Join(f, "data")) },
	"shortened":      func(f string) error { return os.Truncate(filepath.Join(f, "data"), 100) },
}

// harm does it at a part that holds the blob; false when it doesn't hold it.
func (c *Cluster) harm(name string, d digest.Digest, do func(folder string) error) bool {
	c.t.Helper()
	folder := filepath.Join(c.StateDir(name), "blobs", "sha256", d.Encoded()[:2], d.Encoded())
	if _, err := os.Stat(folder); err != nil {
		return false
	}
	if err := do(folder); err != nil {
		c.t.Fatal(err)
	}
	return true
}

func (c *Cluster) writeback(name string) (s cluster.WritebackStatus) {
	c.t.Helper()
	_, b, err := get("http://" + c.Admin(name) + "/writeback")
	if err := errors.Join(err, json.Unmarshal(b, &s)); err != nil {
		c.t.Fatal(err)
	}
	return s
}

// A file that was removed or shortened under running origins and agents is read from elsewhere, by the first who asks.
func TestLostFilesAreFetchedAgain(t *testing.T) {
	c := New(t, 1)
	seed := byte(0)
	for name, do := range harms {
		for _, size := range []int{3000, 5_000_000} {
			seed++
			b := noise(size, seed)
			d := digest.FromBytes(b)
			if err := pushBlob(t.Context(), c.Proxy, "demo/lost", b); err != nil {
				t.Fatal(err)
			}
			wantBlob(t, c.Agents[0], "demo/lost", b)
			if !c.harm("agent-01", d, do) {
				t.Fatal("the agent has no such blob")
			}
			wantBlob(t, c.Agents[0], "demo/lost", b)
			writtenBack(t, c)
			for i := range c.Origins {
				c.harm(fmt.Sprintf("origin-%02d", i+1), d, do)
			}
			wantBlob(t, c.Proxy, "demo/lost", b)
			if t.Failed() {
				t.Fatalf("%s, %d bytes", name, size)
			}
		}
	}
}

// The debt of a lost file stays, and is paid with the bytes of the other owner, by the bucket's own copy, or by a new
// push.
func TestDebtsOutliveLostFiles(t *testing.T) {
	c := New(t, 0)
	c.Bucket.SetDown(true)
	one, all := noise(300_000, 1), noise(300_001, 2)
	for _, b := range [][]byte{one, all} {
		if err := pushBlob(t.Context(), c.Proxy, "demo/owed", b); err != nil {
			t.Fatal(err)
		}
	}
	names := []string{"origin-01", "origin-02", "origin-03"}
	owners := ring.New(names, 2)
	Eventually(t, 30*time.Second, func() error { // an origin that is no owner, and took the push, hands it over
		for _, b := range [][]byte{one, all} {
			d := digest.FromBytes(b)
			for _, name := range names {
				if there := c.harm(name, d, func(string) error { return nil }); there != owners.Owns(name, d) {
					return fmt.Errorf("%s is at %s: %v", d, name, there)
				}
			}
		}
		return nil
	})
	c.harm(owners.Owners(digest.FromBytes(one))[0], digest.FromBytes(one), os.RemoveAll)
	for _, name := range owners.Owners(digest.FromBytes(all)) {
		c.harm(name, digest.FromBytes(all), harms["file removed"])
	}
	wantBlob(t, c.Proxy, "demo/owed", one)
	if _, err := readBlob(t.Context(), c.Proxy, "demo/owed", digest.FromBytes(all)); err == nil {
		t.Error("read though no copy is left")
	}
	Eventually(t, 30*time.Second, func() error {
		for _, name := range owners.Owners(digest.FromBytes(all)) {
			if s := c.writeback(name); s.Lost != 1 || s.Pending < s.Lost || s.Error == "" {
				return fmt.Errorf("%s says %+v, want one lost and an error", name, s)
			}
		}
		return nil
	})
	c.Bucket.SetDown(false)
	if err := pushBlob(t.Context(), c.Proxy, "demo/owed", all); err != nil {
		t.Fatal(err)
	}
	writtenBack(t, c)
	for _, b := range [][]byte{one, all} {
		for i := range c.Origins { // what is read now is the bucket's
			c.harm(fmt.Sprintf("origin-%02d", i+1), digest.FromBytes(b), os.RemoveAll)
		}
		wantBlob(t, c.Proxy, "demo/owed", b)
	}
	for _, name := range names {
		if s := c.writeback(name); s.Lost != 0 {
			t.Errorf("%s says %+v", name, s)
		}
	}
}
