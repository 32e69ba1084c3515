package cluster

import (
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/registry"
)

// A signature covers every field, and only the keys that are configured make one.
func TestSignatureCoversEveryField(t *testing.T) {
	file := filepath.Join(t.TempDir(), "keys", "record.key")
	s, made, err := OpenNameSigner(file)
	if err != nil || !made {
		t.Fatal(made, err)
	}
	if i, err := os.Stat(file); err != nil || i.Mode().Perm() != 0o600 {
		t.Errorf("the private key has mode %v, %v", i.Mode(), err)
	}
	again, made, err := OpenNameSigner(file)
	if err != nil || made || !again.Public().Equal(s.Public()) {
		t.Fatalf("the second start makes a key: %v, %v", made, err)
	}
	keys, err := ParseNameKeys([]string{base64.StdEncoding.EncodeToString(make([]byte, ed25519.PublicKeySize)), "file:" + file + ".pub"})
	if err != nil || len(keys) != 2 {
		t.Fatal(keys, err)
	}
	r := s.Sign(NameRecord{
		Version: 1, Kind: kindManifest, Repository: "a", Tag: "v", Digest: digest.FromString("{}"), MediaType: "a/b", Size: 2, Bytes: []byte("{}"),
		Generation: 5, Time: time.Now(),
	})
	if err := keys.Verify(r); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*NameRecord){
		"version": func(r *NameRecord) { r.Version = 2 }, "kind": func(r *NameRecord) { r.Kind = kindLayer },
		"repository": func(r *NameRecord) { r.Repository = "av"; r.Tag = "" }, "tag": func(r *NameRecord) { r.Tag = "w" },
		"digest": func(r *NameRecord) { r.Digest = digest.FromString("x") }, "media type": func(r *NameRecord) { r.MediaType = "a/c" },
		"size": func(r *NameRecord) { r.Size = 3 }, "bytes": func(r *NameRecord) { r.Bytes = []byte("[]") },
		"generation": func(r *NameRecord) { r.Generation = 6 }, "time": func(r *NameRecord) { r.Time = r.Time.Add(1) },
		"signature": func(r *NameRecord) { r.Signature = nil },
	} {
		other := r
		if change(&other); !errors.Is(keys.Verify(other), registry.ErrDenied) {
			t.Errorf("another %s is believed", name)
		}
	}
	d := s.Deletion(r)
	if err := keys.VerifyDeletion(d); err != nil {
		t.Error(err)
	}
	d.Generation++
	if !errors.Is(keys.VerifyDeletion(d), registry.ErrDenied) {
		t.Error("a deletion of a later generation is believed")
	}
}

func TestBadKeys(t *testing.T) {
	file := filepath.Join(t.TempDir(), "x.pem")
	if err := os.WriteFile(file, []byte("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, k := range []string{"", "x", "AAAA", "file:", "file:" + file, "file:/dev/null"} {
		if _, err := ParseNameKeys([]string{k}); err == nil || !strings.Contains(err.Error(), "key 1") {
			t.Errorf("%q: %v", k, err)
		}
	}
	if _, _, err := OpenNameSigner(file); err == nil {
		t.Error("a public key signs")
	}
}
