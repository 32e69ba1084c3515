package sqlite

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/pressly/goose/v3"

	"kraken/buildindex/names"
)

// openAt opens a new database of an older schema.
func openAt(t *testing.T, schema int64) (s *Store, path string) {
	t.Helper()
	s, path = open(t)
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		t.Fatal(err)
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, s.w, files)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.DownTo(t.Context(), schema); err != nil {
		t.Fatal(err)
	}
	return s, path
}

// What was mirrored before claims went with their manifests is there afterwards, but for layers that no registry keeps.
func TestMirroredClaimsAreMigrated(t *testing.T) {
	s, path := openAt(t, 8)
	d := func(what string) digest.Digest { return digest.FromString(what) }
	image := fmt.Sprintf(`{"config":{"digest":%q,"mediaType":"a/b"},"layers":[{"digest":%q},{"digest":%q,"mediaType":"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"},{"digest":%q,"data":"e30="}]}`,
		d("config"), d("layer"), d("foreign"), d("inline"))
	for m, raw := range map[string]string{"image": image, "index": `{"manifests":[]}`, "odd": "\xff{"} {
		if _, err := s.w.Exec(`INSERT INTO mirrored_manifests (repository, digest, media_type, artifact_type, subject, bytes, size) VALUES ('docker.io/x/y', ?, '', '', '', ?, 1)`, d(m), []byte(raw)); err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range []string{"config", "layer", "foreign", "inline"} {
		if _, err := s.w.Exec(`INSERT INTO mirrored_layers (repository, digest, size) VALUES ('docker.io/x/y', ?, 7)`, d(l)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s, err := Open(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for l, want := range map[string]bool{"config": true, "layer": true, "foreign": false, "inline": false} {
		got, err := s.MirroredLayer(t.Context(), "docker.io/x/y", d(l))
		if want && (err != nil || got != (names.MirroredLayer{Size: 7})) || !want && !errors.Is(err, names.ErrNotFound) {
			t.Errorf("%s: %+v, %v", l, got, err)
		}
	}
	if n, err := s.MirroredBytes(t.Context()); err != nil || n != 3 {
		t.Errorf("%d bytes, %v", n, err)
	}
	update(t, s, func(tx names.Tx) error {
		_, err := tx.PruneMirrored(3)
		return err
	})
	if _, err := s.MirroredLayer(t.Context(), "docker.io/x/y", d("layer")); !errors.Is(err, names.ErrNotFound) {
		t.Errorf("the manifest went, the claim: %v", err)
	}
}
