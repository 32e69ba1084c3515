package cluster

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/registry"
)

var (
	digestA = digest.FromString("a")
	digestB = digest.FromString("b")
)

// Of two changes of one name exactly one stays, and it is the same one whichever comes first.
func TestWins(t *testing.T) {
	tag, low, high := TagName("r", "v"), digestA, digestB
	if low > high {
		low, high = high, low
	}
	manifest, member := ManifestName("r", digestA), MembershipName("r", digestA)
	for name, c := range map[string]struct {
		winner, loser Change
	}{
		"a later put of a tag":             {PutTag("r", "v", low).At(2), PutTag("r", "v", high).At(1)},
		"a later deletion of a tag":        {DeleteName(tag).At(2), PutTag("r", "v", high).At(1)},
		"a tag that was put again":         {PutTag("r", "v", low).At(3), DeleteName(tag).At(2)},
		"a manifest that was put again":    {PutName(manifest).At(3), DeleteName(manifest).At(2)},
		"a later deletion of a manifest":   {DeleteName(manifest).At(2), PutName(manifest).At(1)},
		"a blob that was mounted again":    {PutName(member).At(3), DeleteName(member).At(2)},
		"a deletion of what has none":      {DeleteName(member).At(1), PutName(member).At(NoGeneration)},
		"one generation: the deletion":     {DeleteName(tag).At(2), PutTag("r", "v", high).At(2)},
		"one generation: the greater":      {PutTag("r", "v", high).At(2), PutTag("r", "v", low).At(2)},
		"none at all: the greater":         {PutTag("r", "v", high), PutTag("r", "v", low)},
		"the last generation there may be": {DeleteName(tag).At(1<<63 - 1), PutTag("r", "v", low).At(1<<63 - 2)},
	} {
		if !c.winner.Wins(c.loser) || c.loser.Wins(c.winner) {
			t.Errorf("%s: %s and %s: %v, %v", name, c.winner, c.loser, c.winner.Wins(c.loser), c.loser.Wins(c.winner))
		}
		for _, order := range [][]Change{{c.winner, c.loser}, {c.loser, c.winner}, {c.loser, c.winner, c.loser}} {
			l := Latest{}
			for _, c := range order {
				l.Add(c)
			}
			if l[c.winner.Name] != c.winner || !l.Beats(c.loser) || l.Beats(c.winner) || !l.Has(c.loser.Name) {
				t.Errorf("%s: of %v stays %s", name, order, l[c.winner.Name])
			}
		}
	}
	all := []Change{
		PutTag("r", "v", low).At(9), PutTag("r", "w", low).At(1), PutTag("s", "v", low).At(1), PutName(manifest).At(1), PutName(member).At(1),
		PutName(ManifestName("r", digestB)).At(1), PutName(ManifestName("s", digestA)).At(1),
	}
	for i, a := range all {
		for j, b := range all {
			if i != j && a.Wins(b) {
				t.Errorf("%s wins over %s, which is another name", a, b)
			}
		}
		if a.Wins(a) {
			t.Errorf("%s wins over itself", a)
		}
	}
}

// A record has its change, on the wire and back.
func TestRecordOfEachChange(t *testing.T) {
	now := time.Now()
	raw := []byte(`{"schemaVersion":2}`)
	d := digest.FromBytes(raw)
	for _, c := range []Change{
		PutTag("r", "v", d), PutName(ManifestName("r", d)), PutName(MembershipName("r", d)),
		DeleteName(TagName("r", "v")), DeleteName(ManifestName("r", d)), DeleteName(MembershipName("r", d)),
	} {
		c = c.At(now.UnixMicro())
		r := NewRecord(c, now)
		if c.PutsManifest() {
			r.MediaType, r.Size, r.Bytes = "a/b", int64(len(raw)), raw
		}
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseNameRecord(b, nil, now)
		if err != nil || got.Change() != c {
			t.Errorf("%s came back as %s, %v", c, got.Change(), err)
		}
		also := r.Changes()
		if also[0] != c || len(also) > 1 && also[1] != PutName(ManifestName("r", d)).At(c.Generation) || (len(also) == 2) != (c.Kind == Tag && c.Act == Put) {
			t.Errorf("%s changes %v", c, also)
		}
	}
	if c := (NameRecord{Kind: "x", Repository: "r", Tag: "v", Generation: 1}).Change(); c.Kind != 0 || c.Act != 0 {
		t.Errorf("a kind that is not known is taken for %s", c)
	}
}

var update = flag.Bool("update", false, "write the golden files anew")

// What versions 1 and 2 have written stays readable, and stays what is written: at origins, in the outbox, and signed.
func TestGoldenRecords(t *testing.T) {
	at := time.Date(2026, 11, 1, 12, 0, 0, 123456000, time.UTC)
	gen := at.UnixMicro()
	raw := []byte(`{"schemaVersion":2}`)
	d := digest.FromBytes(raw)
	manifest := func(r NameRecord) NameRecord {
		r.MediaType, r.Size, r.Bytes = "application/vnd.oci.image.manifest.v1+json", int64(len(raw)), raw
		return r
	}
	ref := manifest(NewRecord(PutTag("demo/app", "v2", d).At(gen), at))
	ref.Version, ref.Bytes = NameRef, nil
	member := NewRecord(PutName(MembershipName("demo/app", digestA)).At(gen), at)
	member.Size = 7
	signature := NewRecord(DeleteName(TagName("demo/app", "v1")).At(gen), at)
	signature.Signature = []byte("signature")
	for name, r := range map[string]NameRecord{
		"put-tag":           manifest(NewRecord(PutTag("demo/app", "v1", d).At(gen), at)),
		"put-tag-2":         ref,
		"put-manifest":      manifest(NewRecord(PutName(ManifestName("demo/app", d)).At(gen), at)),
		"put-layer":         member,
		"delete-tag":        NewRecord(DeleteName(TagName("demo/app", "v1")).At(gen), at),
		"delete-tag-signed": signature,
		"delete-manifest":   NewRecord(DeleteName(ManifestName("demo/app", d)).At(gen), at),
		"delete-layer":      NewRecord(DeleteName(MembershipName("demo/app", digestA)).At(gen), at),
	} {
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		b = append(b, "\n"+NameKey(r)+"\n"+digest.FromBytes(r.signed()).Encoded()+"\n"...)
		file := filepath.Join("testdata", "records", name+".txt")
		if *update {
			if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, b, 0o644)); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil || !bytes.Equal(b, want) {
			t.Errorf("%s is written\n%swant\n%s%v", name, b, want, err)
		}
		line, _, _ := bytes.Cut(want, []byte("\n"))
		got, err := ParseNameRecord(line, nil, at)
		if err != nil || got.Change() != r.Change() || NameKey(got) != NameKey(r) {
			t.Errorf("%s is read as %s, %v", name, got.Change(), err)
		}
	}
	// Unknown fields are ignored, unknown kinds are not taken.
	more := []byte(`{"version":1,"kind":"deleted","repository":"r","tag":"v","digest":"","size":0,"generation":1,"time":"2026-11-01T12:00:00Z","zone":"x"}`)
	if got, err := ParseNameRecord(more, nil, at); err != nil || got.Change() != DeleteName(TagName("r", "v")).At(1) {
		t.Errorf("with a field that is not known: %s, %v", got.Change(), err)
	}
	if _, err := ParseNameRecord(bytes.Replace(more, []byte("deleted"), []byte("moved"), 1), nil, at); !errors.Is(err, registry.ErrRecordInvalid) {
		t.Errorf("a kind that is not known: %v", err)
	}
}
