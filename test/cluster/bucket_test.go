package cluster

import (
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"

	"kraken/proto/cluster"
)

// bucketIs waits until /writeback of the parts says so of their bucket.
func (f *fleet) bucketIs(state string, parts ...string) {
	f.t.Helper()
	Eventually(f.t, time.Minute, func() error {
		for _, name := range parts {
			_, b, err := get("http://" + f.c.Admin(name) + "/writeback")
			var s cluster.WritebackStatus
			if err == nil {
				err = json.Unmarshal([]byte(b), &s)
			}
			if err != nil {
				return err
			}
			if len(s.Buckets) != 1 || s.Buckets[0].State != state || s.Buckets[0].Since.IsZero() || (state == "ready") != (s.Buckets[0].Error == "") {
				return fmt.Errorf("%s says %+v, want %s", name, s.Buckets, state)
			}
		}
		return nil
	})
}

// TestBucketStates: a bucket that is down, or refuses the key, is told as that, and gets all that it is owed soon after
// it is back.
func TestBucketStates(t *testing.T) {
	f := newFleet(t, 3)
	all := append(slices.Clone(f.names), "build-index")
	f.bucketIs("ready", all...)
	f.c.Bucket.SetDown(true)
	blobs := f.blobs(30, f.names[0], f.names[1])
	for _, b := range blobs {
		f.push("demo/x", b, f.names[0], f.names[1])
	}
	f.bucketIs("down", f.names[0], f.names[1])
	f.c.Bucket.SetDenied(true)
	f.c.Bucket.SetDown(false)
	f.bucketIs("denied", f.names[0], f.names[1])
	f.c.Bucket.SetDenied(false)
	f.bucketIs("ready", all...)
	f.settled()
	f.wantStored("demo/x", blobs)
}
