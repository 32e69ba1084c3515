package registry

import (
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/transport"
)

func (s Server) manifest(w http.ResponseWriter, r *http.Request, repo, arg string) error {
	ref, err := ParseReference(arg)
	if err != nil {
		return err
	}
	switch {
	case (r.Method == http.MethodGet || r.Method == http.MethodHead) && s.Manifests != nil:
		return s.getManifest(w, r, repo, ref)
	case r.Method == http.MethodPut && s.ManifestWriter != nil:
		return s.putManifest(w, r, repo, ref)
	case r.Method == http.MethodDelete && s.ManifestWriter != nil:
		if err := s.ManifestWriter.DeleteManifest(r.Context(), repo, ref); err != nil {
			return err
		}
		w.WriteHeader(http.StatusAccepted)
		return nil
	}
	return s.unsupported(r)
}

func (s Server) getManifest(w http.ResponseWriter, r *http.Request, repo string, ref Reference) error {
	known, any := etags(r.Header.Values("If-None-Match"))
	var have digest.Digest // what the backend need not send
	if len(known) == 1 {
		have = known[0]
	}
	m, err := s.Manifests.GetManifest(r.Context(), repo, ref, GetOptions{Have: have})
	if err != nil {
		return err
	}
	h := w.Header()
	h.Set("Docker-Content-Digest", m.Digest.String())
	h.Set("ETag", etag(m.Digest))
	if m.Warning != "" {
		h.Set("Warning", m.Warning)
	}
	if m.MediaType != "" {
		h.Set("Content-Type", m.MediaType)
	}
	if any || slices.Contains(known, m.Digest) {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	h.Set("Content-Length", strconv.Itoa(len(m.Bytes)))
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodGet {
		w.Write(m.Bytes) // an error here is a client that went away
	}
	return nil
}

func parseETag(h string) digest.Digest {
	d, err := parseDigest(strings.Trim(strings.TrimPrefix(strings.TrimSpace(h), "W/"), `"`))
	if err != nil {
		return ""
	}
	return d
}

// etags reads a list of entity tags (RFC 9110 section 13.1). What is none of ours can't match and is left out; any says
// that the list is "*". The result is nil only without a header.
func etags(values []string) (ds []digest.Digest, any bool) {
	if len(values) == 0 {
		return nil, false
	}
	ds = []digest.Digest{}
	for _, v := range strings.Split(strings.Join(values, ","), ",") {
		if strings.TrimSpace(v) == "*" {
			any = true
		} else if d := parseETag(v); d != "" {
			ds = append(ds, d)
		}
	}
	return ds, any
}

// putOptions returns the conditions and the tag parameters of a push. ErrTagInvalid, ErrTooManyTags.
func putOptions(r *http.Request, ref Reference) (o PutOptions, err error) {
	if o.IfMatch, o.IfExists = etags(r.Header.Values("If-Match")); o.IfExists {
		o.IfMatch = nil
	}
	o.IfNoneMatch, o.IfAbsent = etags(r.Header.Values("If-None-Match"))
	if ref.Tag != "" {
		return o, nil
	}
	for _, t := range r.URL.Query()["tag"] {
		if err := CheckTag(t); err != nil {
			return o, err
		}
		if !slices.Contains(o.Tags, t) {
			o.Tags = append(o.Tags, t)
		}
	}
	if len(o.Tags) > MaxTagParameters {
		return o, fmt.Errorf("%w: %d, at most %d", ErrTooManyTags, len(o.Tags), MaxTagParameters)
	}
	return o, nil
}

func (s Server) putManifest(w http.ResponseWriter, r *http.Request, repo string, ref Reference) error {
	o, err := putOptions(r, ref)
	if err != nil {
		return err
	}
	if r.ContentLength > MaxManifest {
		return fmt.Errorf("%w: it has %d bytes", ErrManifestTooLarge, r.ContentLength)
	}
	raw, err := io.ReadAll(io.LimitReader(r.Body, MaxManifest+1))
	if err != nil {
		return fmt.Errorf("%w: read body: %w", ErrManifestInvalid, err)
	}
	if len(raw) > MaxManifest {
		return ErrManifestTooLarge
	}
	mediaType := r.Header.Get("Content-Type")
	if mt, _, err := mime.ParseMediaType(mediaType); err == nil {
		mediaType = mt
	}
	o.KeepTags = s.Dialect.get(r.Header, s.Dialect.KeepTags) == "true" || !May(r.Context(), repo, ActionOverwrite)
	res, err := s.ManifestWriter.PutManifest(r.Context(), repo, ref, mediaType, raw, o)
	if err != nil {
		return s.mayOverwrite(r, repo, err)
	}
	h := w.Header()
	h.Set("Location", "/v2/"+repo+"/manifests/"+res.Digest.String())
	h.Set("Docker-Content-Digest", res.Digest.String())
	if res.Subject != "" {
		h.Set("OCI-Subject", res.Subject.String())
	}
	for _, t := range res.Tags {
		h.Add("OCI-Tag", t)
	}
	h.Set("Content-Length", "0")
	w.WriteHeader(http.StatusCreated)
	return nil
}

func (s Server) referrers(w http.ResponseWriter, r *http.Request, repo, arg string) error {
	d, err := parseDigest(arg)
	if err != nil {
		return err
	}
	q := r.URL.Query()
	p, err := s.Referrers.ListReferrers(r.Context(), repo, d, q.Get("artifactType"), q.Get("last"))
	if err != nil {
		return err
	}
	if p.Filtered {
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	if p.Next != "" {
		v := url.Values{"last": {p.Next}}
		if t := q.Get("artifactType"); t != "" {
			v.Set("artifactType", t)
		}
		if ns := q.Get("ns"); ns != "" {
			v.Set("ns", ns)
		}
		w.Header().Set("Link", fmt.Sprintf(`<%s?%s>; rel="next"`, r.URL.Path, v.Encode()))
	}
	idx := v1.Index{MediaType: v1.MediaTypeImageIndex, Manifests: p.Descriptors}
	idx.SchemaVersion = 2
	if idx.Manifests == nil {
		idx.Manifests = []v1.Descriptor{}
	}
	w.Header().Set("Content-Type", v1.MediaTypeImageIndex)
	return transport.WriteJSON(w, http.StatusOK, idx)
}

// SniffMediaType returns the media type of a manifest by its content: its own mediaType field, else by what it lists.
// Empty when it is no manifest.
func SniffMediaType(raw []byte) string {
	var doc struct {
		MediaType string          `json:"mediaType"`
		Config    json.RawMessage `json:"config"`
		Layers    json.RawMessage `json:"layers"`
		Manifests json.RawMessage `json:"manifests"`
	}
	if json.Unmarshal(raw, &doc) != nil {
		return ""
	}
	switch {
	case doc.MediaType != "":
		return doc.MediaType
	case doc.Manifests != nil && doc.Layers == nil && doc.Config == nil:
		return v1.MediaTypeImageIndex
	case doc.Config != nil || doc.Layers != nil:
		return v1.MediaTypeImageManifest
	}
	return ""
}
