package cluster

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"regexp"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/registry"
)

// Whatever an origin is sent as a record, or a build-index is given back, is refused in words or is what its fields
// say; its key is the name of a file.
func FuzzNameRecord(f *testing.F) {
	f.Add([]byte(`{"version":1,"kind":"deleted","repository":"../a","tag":"/v1","digest":"sha256:00","media_type":"layer"}`))
	f.Add([]byte(`{"version":1,"kind":"manifest","repository":"a/b","tag":"v1","digest":"` + digest.FromString("{}").String() + `","media_type":"a/b","size":2,"bytes":"e30=","generation":5}`))
	f.Add([]byte(`{"version":2,"kind":"manifest","repository":"a","tag":"v","digest":"` + digest.FromString("{}").String() + `","media_type":"a/b","size":2,"generation":9223372036854775806}`))
	f.Add([]byte(`{"version":1,"kind":"deleted","repository":"a","tag":"v","generation":-1,"time":"9999-01-01T00:00:00Z","signature":"AA=="}`))
	f.Add([]byte(`{"version":1,"kind":"layer","repository":"a","digest":"` + digest.FromString("{}").String() + `","size":-1,"generation":7}`))
	f.Add([]byte(`{"version":1,"kind":"refused","repository":"a","digest":"` + digest.FromString("{}").String() + `","size":0,"generation":7}`))
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		f.Fatal(err)
	}
	now := time.Now()
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseNameRecord(b, nil, now)
		if key := NameKey(r); !fileName.MatchString(key) {
			t.Errorf("%s: key %q", b, key)
		}
		if err != nil {
			if !errors.Is(err, registry.ErrRecordInvalid) {
				t.Errorf("%s: %v is none of the table", b, err)
			}
			return
		}
		if registry.CheckName(r.Repository) != nil || r.Generation < 1 || r.Generation > now.Add(MaxGenerationSkew).UnixMicro() || r.Size < 0 {
			t.Errorf("%s is taken as %+v", b, r)
		}
		if len(r.Bytes) > 0 && r.Digest.Algorithm().FromBytes(r.Bytes) != r.Digest {
			t.Errorf("%s: the bytes are not %s", b, r.Digest)
		}
		signed := (&NameSigner{private}).Sign(r)
		if err := (NameKeys{public}).Verify(signed); err != nil {
			t.Errorf("%s: its own signature: %v", b, err)
		}
		line, err := json.Marshal(signed)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseNameRecord(line, NameKeys{public}, now); err != nil && len(line) <= MaxNameRecord {
			t.Errorf("%s: read back: %v", line, err)
		}
		signed.Generation--
		if (NameKeys{public}).Verify(signed) == nil {
			t.Errorf("%s: the signature does not cover the generation", b)
		}
	})
}

var fileName = regexp.MustCompile(`^[0-9a-f]{64}$`)
