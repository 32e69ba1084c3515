package abuse

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/cluster"
)

// forged is a record of a tag as a stranger writes it, in form right, without a signature.
func forged(repository, tag string, manifest []byte) cluster.NameRecord {
	now := time.Now()
	return cluster.NameRecord{
		Version: cluster.NameWhole, Kind: "manifest", Repository: repository, Tag: tag, Digest: digest.FromBytes(manifest),
		MediaType: manifestType, Size: int64(len(manifest)), Bytes: manifest, Generation: now.UnixMicro(), Time: now.UTC(),
	}
}

// forgeries are records that would take a tag over, drive the counter of generations to its end, or stop the
// restoration of names.
func forgeries(t *testing.T, repository, tag string, genuine []byte) map[string]cluster.NameRecord {
	t.Helper()
	evil := manifestOf(t, []byte("evil"))
	with := func(change func(*cluster.NameRecord)) cluster.NameRecord {
		r := forged(repository, tag, evil)
		change(&r)
		return r
	}
	signer, _, err := cluster.OpenNameSigner(filepath.Join(t.TempDir(), "other.key"))
	if err != nil {
		t.Fatal(err)
	}
	return map[string]cluster.NameRecord{
		"2^63-2":         with(func(r *cluster.NameRecord) { r.Generation = 1<<63 - 2 }),
		"2^63-7":         with(func(r *cluster.NameRecord) { r.Generation = 1<<63 - 7 }),
		"now":            with(func(*cluster.NameRecord) {}),
		"an hour ahead":  with(func(r *cluster.NameRecord) { r.Generation += int64(59 * time.Minute / time.Microsecond) }),
		"no manifest":    forged(repository, tag, []byte("these bytes are no manifest")),
		"another digest": with(func(r *cluster.NameRecord) { r.Digest = digest.FromBytes(genuine) }),
		"another key":    signer.Sign(with(func(*cluster.NameRecord) {})),
		"a signature of another record": with(func(r *cluster.NameRecord) {
			r.Signature = signer.Sign(forged(repository, tag, genuine)).Signature
		}),
		"a tombstone": with(func(r *cluster.NameRecord) {
			*r = cluster.NameRecord{Version: 1, Kind: "deleted", Repository: repository, Tag: tag, Generation: r.Generation, Time: r.Time}
		}),
		"a tombstone of the manifest": with(func(r *cluster.NameRecord) {
			*r = cluster.NameRecord{Version: 1, Kind: "deleted", Repository: repository, Digest: digest.FromBytes(genuine), Generation: r.Generation, Time: r.Time}
		}),
		"a membership": with(func(r *cluster.NameRecord) {
			*r = cluster.NameRecord{Version: 1, Kind: "layer", Repository: repository, Digest: digest.FromString("elsewhere"), Size: 9, Generation: r.Generation, Time: r.Time}
		}),
	}
}

// TestForgedRecords writes forged name records to the origins: with plain HTTP as whoever reaches them, with mutual TLS
// as a node whose key was stolen. None is taken, and neither is the deletion of one. Then somebody who has an origin's
// disk writes them there, and build-index loses its database: all names come back, the forged ones change none, and
// readiness names them.
func TestForgedRecords(t *testing.T) {
	t.Run("plain", func(t *testing.T) { forgeRecords(t, start(t, options{agents: 1})) })
	t.Run("mutual TLS", func(t *testing.T) { forgeRecords(t, start(t, options{agents: 1, mutualTLS: true})) })
}

func forgeRecords(t *testing.T, c *system) {
	hc, node := c.client(t), c.client(t)
	if c.plan.MutualTLS {
		node = c.clientOf(t, "agent-01")
	}
	const repository, tag = "release/app", "v1"
	genuine := push(t, hc, c.Proxy.URL, repository, tag, random(1000))
	plain := push(t, hc, c.Proxy.URL, "plain/app", "latest", random(1000))
	all := forgeries(t, repository, tag, genuine)
	for what, r := range all {
		key := cluster.NameKey(r)
		line, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range c.Origins {
			a := do(t, node, "PUT", o.URL, "/v2/"+repository+"/_kraken/names/"+key, line, "Content-Type", "application/json")
			if a.status != http.StatusBadRequest && a.status != http.StatusForbidden {
				t.Errorf("%s at %s: status %d, want 400 or 403: %.200s", what, o.Name, a.status, a.body)
			}
			a = do(t, node, "DELETE", o.URL, fmt.Sprintf("/v2/%s/_kraken/names/%s?generation=%d&signature=", repository, key, int64(1<<63-1)), nil)
			a.want(t, http.StatusForbidden, "deletion of a record")
		}
	}
	c.settled(t)

	// An origin's disk is somebody else's for a while.
	broken := c.Origins[1]
	broken.kill(t)
	for what, r := range all {
		line, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(broken.state(), "names", cluster.NameKey(r)), line, 0o600); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	if err := os.WriteFile(filepath.Join(broken.state(), "names", strings.Repeat("ab", 32)), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	broken.start(t)
	c.BuildIndex.kill(t)
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := os.Remove(filepath.Join(c.BuildIndex.state(), "names.db"+suffix)); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
	}
	c.BuildIndex.start(t)
	for name, want := range map[string][]byte{repository + "/manifests/" + tag: genuine, "plain/app/manifests/latest": plain} {
		eventually(t, 30*time.Second, func() error {
			a := do(t, hc, "GET", c.Proxy.URL, "/v2/"+name, nil)
			if a.status != http.StatusOK || !bytes.Equal(a.body, want) {
				return fmt.Errorf("%s: status %d: %.200s", name, a.status, a.body)
			}
			return nil
		})
	}
	eventually(t, 30*time.Second, func() error {
		if s := c.BuildIndex.writeback(t); s.SetAsideCount == 0 || s.SetAside[0].Where != broken.ID() || s.SetAside[0].Repository != repository {
			return fmt.Errorf("/writeback: %+v", s)
		}
		a := do(t, http.DefaultClient, "GET", c.BuildIndex.AdminURL, "/readiness", nil).want(t, http.StatusOK, "readiness")
		if !strings.Contains(string(a.body), "set aside") || !strings.Contains(string(a.body), repository) {
			return fmt.Errorf("readiness does not name what is set aside: %s", a.body)
		}
		return nil
	})
	// All goes on: the owner pushes the same again, and what is new, and an immutable tag stays.
	push(t, hc, c.Proxy.URL, "plain/app", "latest", random(1000))
	do(t, hc, "PUT", c.Proxy.URL, "/v2/"+repository+"/manifests/"+tag, genuine, "Content-Type", manifestType).want(t, http.StatusCreated, "the owner's push of the same")
	again := do(t, hc, "GET", c.Proxy.URL, "/v2/"+repository+"/manifests/"+tag, nil).want(t, http.StatusOK, "the tag at last")
	if !bytes.Equal(again.body, genuine) {
		t.Errorf("the immutable tag is another: %s", again.body)
	}
	eventually(t, 45*time.Second, func() error {
		if s := c.BuildIndex.writeback(t); s.Pending > 0 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
}

// TestUnsignedRecords: without keys a record in the right form is believed, as documented, but no generation from the
// far future.
func TestUnsignedRecords(t *testing.T) {
	c := start(t, options{config: map[string]map[string]any{"origin": {"record_keys": []string{}}, "build-index": {"record_key_file": ""}}})
	hc := c.client(t)
	genuine := push(t, hc, c.Proxy.URL, "release/app", "v1", random(1000))
	c.settled(t)
	for what, r := range forgeries(t, "release/app", "v1", genuine) {
		if !strings.HasPrefix(what, "2^63") && what != "another digest" {
			continue
		}
		line, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range c.Origins {
			do(t, hc, "PUT", o.URL, "/v2/release/app/_kraken/names/"+cluster.NameKey(r), line).want(t, http.StatusBadRequest, what)
		}
	}
	push(t, hc, c.Proxy.URL, "release/app", "v2", random(1000))
	c.settled(t)
}

// TestManyReferences: a manifest with more references than anybody needs is refused, or taken; either way the names of
// others get to the bucket.
func TestManyReferences(t *testing.T) {
	c := shared(t)
	hc := c.client(t)
	pushBlob(t, hc, c.Proxy.URL, "lax/many", []byte("{}"))
	one := pushBlob(t, hc, c.Proxy.URL, "lax/many", []byte("ok"))
	manifest := func(n int, layer func(i int) digest.Digest) []byte {
		var b strings.Builder
		fmt.Fprintf(&b, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":2},"layers":[`, manifestType, digest.FromString("{}"))
		for i := range n {
			if i > 0 {
				b.WriteByte(',')
			}
			fmt.Fprintf(&b, `{"mediaType":"x/y","digest":%q,"size":2}`, layer(i))
		}
		b.WriteString("]}")
		return []byte(b.String())
	}
	for what, m := range map[string][]byte{
		"10,001 references":      manifest(10_001, func(i int) digest.Digest { return digest.FromString(fmt.Sprint("invented", i)) }),
		"one layer 22,000 times": manifest(22_000, func(int) digest.Digest { return one }),
	} {
		a := do(t, hc, "PUT", c.Proxy.URL, "/v2/lax/many/manifests/v1", m, "Content-Type", manifestType).want(t, http.StatusBadRequest, what)
		if !strings.Contains(string(a.body), "MANIFEST_INVALID") {
			t.Errorf("%s: %.200s", what, a.body)
		}
	}
	// As many as may be, of blobs that are not there: this one is never in the bucket, and nobody waits for it.
	do(t, hc, "PUT", c.Proxy.URL, "/v2/lax/many/manifests/v2", manifest(1999, func(i int) digest.Digest { return digest.FromString(fmt.Sprint("nowhere", i)) }),
		"Content-Type", manifestType).want(t, http.StatusCreated, "1,999 references")
	push(t, hc, c.Proxy.URL, "patient/app", "v1", random(1000))
	eventually(t, 45*time.Second, func() error {
		s := c.BuildIndex.writeback(t)
		for _, a := range s.SetAside {
			if a.Repository != "lax/many" {
				return fmt.Errorf("set aside: %+v", a)
			}
		}
		if s.Pending > s.SetAsideCount {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
}

// TestManyTags: a manifest of 4 MiB that is pushed with 100 tags is kept once beside them, not once for each.
func TestManyTags(t *testing.T) {
	c := start(t, options{})
	hc := c.client(t)
	pushBlob(t, hc, c.Proxy.URL, "lax/tags", []byte("{}"))
	m := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":2},"layers":[],"annotations":{"a":%q}}`,
		manifestType, digest.FromString("{}"), strings.Repeat("a", 4<<20-1000))
	c.Bucket.kill(t) // so that the records stay
	query := ""
	for i := range 100 {
		query += fmt.Sprintf("&tag=t%d", i)
	}
	do(t, hc, "PUT", c.Proxy.URL, "/v2/lax/tags/manifests/"+digest.FromBytes(m).String()+"?"+query[1:], m, "Content-Type", manifestType).
		want(t, http.StatusCreated, "a manifest with 100 tags")
	total, records := int64(0), 0
	for _, o := range c.Origins {
		files, err := filepath.Glob(filepath.Join(o.state(), "names", "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if info, err := os.Stat(f); err == nil {
				total, records = total+info.Size(), records+1
			}
		}
	}
	if records < 200 || total > 24<<20 {
		t.Errorf("%d records with %d MiB at the origins", records, total>>20)
	}
	c.Bucket.start(t)
	c.settled(t)
	if a := do(t, hc, "GET", c.Proxy.URL, "/v2/lax/tags/manifests/t99", nil).want(t, http.StatusOK, "a tag"); !bytes.Equal(a.body, m) {
		t.Error("the tag is another")
	}
}
