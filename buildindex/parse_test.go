package buildindex

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/registry"
)

const (
	digestA = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	digestB = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
)

func TestOCIParseManifest(t *testing.T) {
	desc := func(mt, d string) string { return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":5}`, mt, d) }
	config := `"config":` + desc(v1.MediaTypeImageConfig, digestA)
	layers := `"layers":[` + desc(v1.MediaTypeImageLayer, digestB) + `]`
	for name, c := range map[string]struct {
		contentType, raw string
		want             string // media type, empty: refused
		blobs, manifests int
	}{
		"image":                    {"", `{"schemaVersion":2,"mediaType":"` + v1.MediaTypeImageManifest + `",` + config + `,` + layers + `}`, v1.MediaTypeImageManifest, 2, 0},
		"image, sniffed":           {"", `{"schemaVersion":2,` + config + `,` + layers + `}`, v1.MediaTypeImageManifest, 2, 0},
		"image, by Content-Type":   {registry.MediaTypeDockerManifest, `{"schemaVersion":2,` + config + `,` + layers + `}`, registry.MediaTypeDockerManifest, 2, 0},
		"index, sniffed":           {"", `{"schemaVersion":2,"manifests":[` + desc(v1.MediaTypeImageManifest, digestA) + `]}`, v1.MediaTypeImageIndex, 0, 1},
		"empty index":              {v1.MediaTypeImageIndex, `{"schemaVersion":2,"manifests":[]}`, v1.MediaTypeImageIndex, 0, 0},
		"index without a list":     {v1.MediaTypeImageIndex, `{"schemaVersion":2,"mediaType":"` + v1.MediaTypeImageIndex + `","manifests":null}`, v1.MediaTypeImageIndex, 0, 0},
		"image without layers":     {v1.MediaTypeImageManifest, `{"schemaVersion":2,` + config + `,"layers":null,"manifests":null}`, v1.MediaTypeImageManifest, 1, 0},
		"Docker list":              {registry.MediaTypeDockerManifestList, `{"schemaVersion":2,"mediaType":"` + registry.MediaTypeDockerManifestList + `","manifests":[` + desc(registry.MediaTypeDockerManifest, digestA) + `]}`, registry.MediaTypeDockerManifestList, 0, 1},
		"foreign layer":            {"", `{"schemaVersion":2,` + config + `,"layers":[` + desc(registry.MediaTypeDockerForeignLayer, digestB) + `]}`, v1.MediaTypeImageManifest, 1, 0},
		"embedded data":            {"", `{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2,"data":"e30="},"layers":[]}`, v1.MediaTypeImageManifest, 0, 0},
		"wrong embedded data":      {"", `{"schemaVersion":2,"config":{"mediaType":"x/y","digest":"` + digestA + `","size":2,"data":"e30="},"layers":[]}`, "", 0, 0},
		"subject is no reference":  {"", `{"schemaVersion":2,` + config + `,"layers":[],"subject":` + desc(v1.MediaTypeImageManifest, digestB) + `}`, v1.MediaTypeImageManifest, 1, 0},
		"not JSON":                 {"", `nope`, "", 0, 0},
		"something follows":        {"", `{"schemaVersion":2,` + config + `,"layers":[]} x`, "", 0, 0},
		"schema 1":                 {"", `{"schemaVersion":1,` + config + `}`, "", 0, 0},
		"both kinds":               {"", `{"schemaVersion":2,` + config + `,"manifests":[]}`, "", 0, 0},
		"neither kind":             {"", `{"schemaVersion":2}`, "", 0, 0},
		"Content-Type contradicts": {v1.MediaTypeImageIndex, `{"schemaVersion":2,"mediaType":"` + v1.MediaTypeImageManifest + `",` + config + `,` + layers + `}`, "", 0, 0},
		"index as image":           {v1.MediaTypeImageManifest, `{"schemaVersion":2,"manifests":[]}`, "", 0, 0},
		"unknown kind":             {"text/plain", `{"schemaVersion":2,` + config + `}`, "", 0, 0},
		"bad digest":               {"", `{"schemaVersion":2,"config":` + desc("x/y", "sha256:zz") + `,"layers":[]}`, "", 0, 0},
		"negative size":            {"", `{"schemaVersion":2,"config":{"mediaType":"x/y","digest":"` + digestA + `","size":-1},"layers":[]}`, "", 0, 0},
	} {
		p, err := parseManifest(c.contentType, []byte(c.raw))
		if c.want == "" {
			if !errors.Is(err, registry.ErrManifestInvalid) {
				t.Errorf("%s: %+v, %v, want ErrManifestInvalid", name, p, err)
			}
			continue
		}
		if err != nil || p.mediaType != c.want || len(p.blobs) != c.blobs || len(p.manifests) != c.manifests {
			t.Errorf("%s: %+v, %v", name, p, err)
		}
	}
}

// A child of an index that is of no known kind may be a manifest or a blob.
func TestOCIIndexOfAnything(t *testing.T) {
	p, err := parseManifest("", []byte(`{"schemaVersion":2,"manifests":[{"mediaType":"application/x-other","digest":"`+digestA+`","size":5}]}`))
	if err != nil || len(p.manifests) != 0 || len(p.either) != 1 {
		t.Errorf("%+v, %v", p, err)
	}
}

func FuzzParseManifest(f *testing.F) {
	f.Add("", `{"schemaVersion":2,"config":{"digest":"`+digestA+`"},"layers":[]}`)
	f.Add(v1.MediaTypeImageIndex, `{"schemaVersion":2,"manifests":[{}]}`)
	f.Fuzz(func(t *testing.T, contentType, raw string) {
		p, err := parseManifest(contentType, []byte(raw))
		if err != nil {
			return
		}
		for _, d := range slices.Concat(p.blobs, p.manifests, p.either, p.members) {
			if d.Validate() != nil || strings.Contains(d.Encoded(), "/") {
				t.Errorf("digest %q came through", d)
			}
		}
	})
}

// What a manifest refers to is missing only when everything that may have it was asked.
func TestMissingReferences(t *testing.T) {
	r := newRig(t)
	gone := digest.FromString("nobody pushed this")
	m := []byte(`{"schemaVersion":2,"mediaType":"` + v1.MediaTypeImageManifest + `","config":{"mediaType":"a/b","digest":"` + gone.String() + `","size":1},"layers":[]}`)
	put := func(want, other error) {
		t.Helper()
		_, err := r.x.PutManifest(t.Context(), "repo", registry.Reference{Tag: "v"}, v1.MediaTypeImageManifest, m, registry.PutOptions{})
		if !errors.Is(err, want) || errors.Is(err, other) || !strings.Contains(fmt.Sprint(err), gone.String()) {
			t.Errorf("put: %v, want %v, with the digest", err, want)
		}
		r.wantTag("v", "")
		r.wantManifest(digest.FromBytes(m), false)
	}
	r.must(r.x.fill(t.Context()))
	put(registry.ErrManifestBlobUnknown, registry.ErrUnavailable)

	for _, o := range r.origins {
		o.set(func() { o.down = true })
	}
	r.start("second.db")
	if err := r.x.fill(t.Context()); err == nil {
		t.Error("restored without the origins")
	}
	put(registry.ErrUnavailable, registry.ErrManifestBlobUnknown)

	r.origins[0].set(func() { r.origins[0].down = false })
	r.must(r.x.fill(t.Context()))
	put(registry.ErrManifestBlobUnknown, registry.ErrUnavailable)
}
