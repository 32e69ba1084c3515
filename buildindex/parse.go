package buildindex

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/buildindex/names"
	"kraken/proto/blob"
	"kraken/proto/registry"
)

// parsed is what build-index needs to know of a manifest.
type parsed struct {
	mediaType    string
	artifactType string
	subject      digest.Digest
	annotations  map[string]string
	blobs        []digest.Digest // that must be members of the repository
	manifests    []digest.Digest // that must be manifests of the repository
	either       []digest.Digest // that must be one or the other: children of an index whose media type tells nothing
	children     []v1.Descriptor // of an index
	members      []digest.Digest // config and layers, for the links in the bucket
	sizes        []names.Member  // of blobs, what the manifest says
	references   int             // descriptors, duplicates counted
}

// maxReferences bounds the descriptors of a manifest that is pushed. Images have at most 127 layers that a runtime can
// mount, and indexes hundreds of children; each reference costs a look into SQL at the push and a question to an origin
// and a link when it is written back.
const maxReferences = 2_000

// bounded refuses a manifest with more references than maxReferences, ErrManifestInvalid.
func (p *parsed) bounded() error {
	if p.references > maxReferences {
		return invalid("it has %d references, duplicates counted, and at most %d are taken", p.references, maxReferences)
	}
	return nil
}

// unique drops duplicates and keeps the order.
func unique(ds []digest.Digest) []digest.Digest {
	seen := make(map[digest.Digest]bool, len(ds))
	return slices.DeleteFunc(ds, func(d digest.Digest) bool {
		again := seen[d]
		seen[d] = true
		return again
	})
}

// document is the union of OCI manifests and indexes and Docker's schema 2 ones.
type document struct {
	SchemaVersion int               `json:"schemaVersion"`
	MediaType     string            `json:"mediaType"`
	ArtifactType  string            `json:"artifactType"`
	Config        *v1.Descriptor    `json:"config"`
	Layers        []v1.Descriptor   `json:"layers"`
	Manifests     list              `json:"manifests"`
	Subject       *v1.Descriptor    `json:"subject"`
	Annotations   map[string]string `json:"annotations"`
}

// list is an array of descriptors that is there; some write null for one without elements.
type list struct {
	there bool
	items []v1.Descriptor
}

// UnmarshalJSON implements json.Unmarshaler.
func (l *list) UnmarshalJSON(b []byte) error {
	l.there = true
	return json.Unmarshal(b, &l.items)
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %s", registry.ErrManifestInvalid, fmt.Errorf(format, args...))
}

// parseManifest accepts OCI manifests and indexes and Docker schema 2 manifests and lists. A missing mediaType is told
// from the content.
func parseManifest(contentType string, raw []byte) (*parsed, error) {
	var doc document
	dec := json.NewDecoder(bytes.NewReader(raw))
	if err := dec.Decode(&doc); err != nil {
		return nil, invalid("not the JSON of a manifest: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, invalid("something follows the manifest's JSON")
	}
	if doc.SchemaVersion != 2 {
		return nil, invalid("schemaVersion is %d, want 2", doc.SchemaVersion)
	}
	p := &parsed{mediaType: doc.MediaType, annotations: doc.Annotations}
	if p.mediaType == "" {
		p.mediaType = registry.SniffMediaType(raw)
	}
	if contentType != "" && contentType != p.mediaType {
		if doc.MediaType != "" {
			return nil, invalid("Content-Type is %q, the manifest's mediaType %q", contentType, doc.MediaType)
		}
		p.mediaType = contentType
	}
	var err error
	switch p.mediaType {
	case v1.MediaTypeImageIndex, registry.MediaTypeDockerManifestList:
		err = p.index(&doc)
	case v1.MediaTypeImageManifest, registry.MediaTypeDockerManifest:
		err = p.image(&doc)
	default:
		err = invalid("media type %q is none that is known", p.mediaType)
	}
	if err == nil && doc.Subject != nil {
		p.subject, err = p.digest("subject", *doc.Subject)
	}
	if err != nil {
		return nil, err
	}
	for _, ds := range []*[]digest.Digest{&p.blobs, &p.manifests, &p.either, &p.members} {
		*ds = unique(*ds)
	}
	return p, nil
}

func (p *parsed) digest(what string, d v1.Descriptor) (digest.Digest, error) {
	p.references++
	if _, err := blob.ParseDigest(d.Digest.String()); err != nil {
		return "", invalid("%s: digest %q is malformed", what, d.Digest)
	}
	if d.Size < 0 {
		return "", invalid("%s: size is %d", what, d.Size)
	}
	return d.Digest, nil
}

func (p *parsed) index(doc *document) error {
	if !doc.Manifests.there || doc.Config != nil || doc.Layers != nil {
		return invalid("an index has manifests, and neither config nor layers")
	}
	p.artifactType, p.children = doc.ArtifactType, doc.Manifests.items
	for i, m := range doc.Manifests.items {
		d, err := p.digest(fmt.Sprintf("manifests[%d]", i), m)
		if err != nil {
			return err
		}
		switch m.MediaType {
		case v1.MediaTypeImageIndex, v1.MediaTypeImageManifest, registry.MediaTypeDockerManifestList, registry.MediaTypeDockerManifest:
			p.manifests = append(p.manifests, d)
		default: // an implementation must not refuse what it does not know (image-spec, image-index.md)
			p.either = append(p.either, d)
		}
	}
	return nil
}

func (p *parsed) image(doc *document) error {
	if doc.Manifests.items != nil || doc.Config == nil {
		return invalid("a manifest has a config, and no manifests")
	}
	if p.artifactType = doc.ArtifactType; p.artifactType == "" {
		p.artifactType = doc.Config.MediaType
	}
	for i, l := range append([]v1.Descriptor{*doc.Config}, doc.Layers...) {
		what := "config"
		if i > 0 {
			what = fmt.Sprintf("layers[%d]", i-1)
		}
		d, err := p.digest(what, l)
		if err != nil {
			return err
		}
		if isNondistributable(l.MediaType) {
			continue
		}
		if l.Data != nil {
			if d.Algorithm().FromBytes(l.Data) != d {
				return invalid("%s: embedded data is not %s", what, d)
			}
			continue
		}
		p.sizes = append(p.sizes, names.Member{Digest: d, Size: l.Size})
		p.blobs = append(p.blobs, d)
		p.members = append(p.members, d)
	}
	return nil
}

// isNondistributable reports whether layers of a media type are not pushed to registries.
func isNondistributable(mediaType string) bool {
	switch mediaType {
	case registry.MediaTypeDockerForeignLayer,
		"application/vnd.oci.image.layer.nondistributable.v1.tar",
		"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
		"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd":
		return true
	}
	return false
}
