package buildindex

import (
	"errors"
	"net/http/httptest"
	"strings"
	"testing"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/buildindex/names"
	"kraken/proto/cluster"
	"kraken/proto/disk"
	"kraken/proto/registry"
	"kraken/test/mounts"
	script "kraken/test/upstream"
)

// TestFullDisk: a push that the database has no room for is 507 and leaves nothing behind, readiness names the file
// system, and reads and deletions go on.
func TestFullDisk(t *testing.T) {
	if !mounts.Alone(t) {
		return
	}
	r := newRig(t)
	r.stop()
	dir := mounts.Small(t, 20<<20)
	u := script.New(t, script.Options{})
	img, repo := u.PutImage("app", "v1", []byte("layer")), u.Alias+"/app"
	u.PutImage("app", "v2", []byte("other"))
	r.dir, r.upstreams = dir, mirrored(u)
	r.start("names.db")
	r.wantMirrored(repo, "v1", img.Manifest.Digest, false)
	one := r.put("v1", "one")
	empty := mounts.Fill(t, dir, 200<<10)
	raw := layered(t, distinct(1)...)
	_, err := r.x.PutManifest(t.Context(), "repo", registry.Reference{Tag: "v2"}, v1.MediaTypeImageManifest, raw, registry.PutOptions{})
	if !errors.Is(err, registry.ErrStorageFull) {
		t.Errorf("a push is answered %v", err)
	}
	err = r.x.putLayer(t.Context(), "repo", cluster.Layer{Digest: distinct(1)[0], Size: 2})
	if !errors.Is(err, registry.ErrStorageFull) || !strings.Contains(err.Error(), dir+" has ") {
		t.Errorf("a membership is answered %v", err)
	}
	rec := httptest.NewRecorder()
	registry.WriteError(rec, httptest.NewRequest("PUT", "/", nil), err)
	if rec.Code != 507 || strings.Contains(rec.Body.String(), dir) || !strings.Contains(rec.Body.String(), "no space left") {
		t.Errorf("the client is told %d %s", rec.Code, rec.Body)
	}
	if err := r.x.checkSpace(t.Context()); err == nil || !strings.Contains(err.Error(), dir+" has ") {
		t.Errorf("readiness says %v", err)
	}
	if m, err := r.get(repo, "v2"); !errors.Is(err, registry.ErrUnavailable) || errors.Is(err, registry.ErrUnauthorized) {
		t.Errorf("an upstream's tag that is not here: %+v, %v", m, err)
	}
	r.wantMirrored(repo, "v1", img.Manifest.Digest, false)
	r.wantTag("v1", one)
	r.delete(registry.Reference{Tag: "v1"})
	r.wantTag("v1", "")
	empty()
	r.put("v2", "two")
}

// TestDatabaseFindsNoRoom: what SQLite says of a full disk is names.ErrFull, nothing of the write is kept, and the next
// one after room was made succeeds.
func TestDatabaseFindsNoRoom(t *testing.T) {
	if !mounts.Alone(t) {
		return
	}
	r := newRig(t)
	r.stop()
	r.dir = mounts.Small(t, 20<<20)
	r.start("names.db")
	empty := mounts.Fill(t, r.dir, 0)
	layers := distinct(4000)
	err := r.x.full(r.x.db.Update(t.Context(), func(tx names.Tx) error {
		for _, d := range layers {
			if err := tx.PutLayer("repo", d, 2, names.NoGeneration); err != nil {
				return err
			}
		}
		return nil
	}))
	var full *disk.FullError
	if !errors.Is(err, registry.ErrStorageFull) || !errors.As(err, &full) || full.Space.Free != 0 {
		t.Errorf("the write is answered %v", err)
	}
	if _, err := r.x.db.Layer(t.Context(), "repo", layers[0]); !errors.Is(err, names.ErrNotFound) {
		t.Errorf("a part of the write was kept: %v", err)
	}
	empty()
	r.put("v1", "one")
}
