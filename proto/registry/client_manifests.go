package registry

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// manifestAccept is the Accept header of manifest reads: whatever is stored.
var manifestAccept = []string{strings.Join([]string{v1.MediaTypeImageManifest, v1.MediaTypeImageIndex, MediaTypeDockerManifest, MediaTypeDockerManifestList, "*/*"}, ", ")}

// GetManifest implements Manifests by GET, with If-None-Match when the caller has one already. It returns
// ErrUnavailable for bytes that do not match the digest.
func (c *Client) GetManifest(ctx context.Context, repo string, ref Reference, o GetOptions) (*Manifest, error) {
	h := http.Header{"Accept": manifestAccept}
	if o.Have != "" {
		h.Set("If-None-Match", etag(o.Have))
	}
	resp, err := c.Do(ctx, Request{Method: http.MethodGet, To: manifestPath(repo, ref), Header: h}, http.StatusOK, http.StatusNotModified)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	m := &Manifest{MediaType: resp.Header.Get("Content-Type"), Warning: resp.Header.Get("Warning")}
	if resp.StatusCode == http.StatusNotModified {
		if o.Have == "" || ref.Digest != "" && ref.Digest != o.Have {
			return nil, fmt.Errorf("%w: manifest %s of %s: 304, and the caller has %q", ErrUnavailable, ref, repo, o.Have)
		}
		m.Digest = o.Have
		return m, nil
	}
	if m.Bytes, err = io.ReadAll(io.LimitReader(resp.Body, MaxManifest+1)); err != nil {
		return nil, fmt.Errorf("%w: read manifest %s of %s: %w", ErrUnavailable, ref, repo, err)
	}
	if len(m.Bytes) > MaxManifest {
		return nil, fmt.Errorf("%w: manifest %s of %s", ErrManifestTooLarge, ref, repo)
	}
	m.Digest = ref.Digest
	if m.Digest == "" {
		if m.Digest, err = parseDigest(resp.Header.Get("Docker-Content-Digest")); err != nil {
			m.Digest = digest.FromBytes(m.Bytes)
		}
	}
	if got := m.Digest.Algorithm().FromBytes(m.Bytes); got != m.Digest {
		return nil, fmt.Errorf("%w: manifest %s of %s: the answer's bytes are %s, not %s", ErrUnavailable, ref, repo, got, m.Digest)
	}
	return m, nil
}

// StatManifest returns the digest, the size and the media type of a manifest, by HEAD; of a registry that answers HEAD
// without a digest by GET. The size is -1 where it is not told.
func (c *Client) StatManifest(ctx context.Context, repo string, ref Reference) (v1.Descriptor, error) {
	resp, err := c.Do(ctx, Request{Method: http.MethodHead, To: manifestPath(repo, ref), Header: http.Header{"Accept": manifestAccept}}, http.StatusOK)
	if err != nil {
		return v1.Descriptor{}, err
	}
	resp.Body.Close()
	out := v1.Descriptor{MediaType: resp.Header.Get("Content-Type"), Size: resp.ContentLength}
	if out.Digest, err = parseDigest(resp.Header.Get("Docker-Content-Digest")); err == nil {
		if ref.Digest != "" && out.Digest != ref.Digest {
			return v1.Descriptor{}, fmt.Errorf("%w: manifest %s of %s: the answer is about %s", ErrUnavailable, ref, repo, out.Digest)
		}
		return out, nil
	}
	m, err := c.GetManifest(ctx, repo, ref, GetOptions{})
	if err != nil {
		return v1.Descriptor{}, err
	}
	return v1.Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: int64(len(m.Bytes))}, nil
}

// PutManifest implements ManifestWriter by PUT.
func (c *Client) PutManifest(ctx context.Context, repo string, ref Reference, mediaType string, raw []byte, o PutOptions) (PutResult, error) {
	h := http.Header{"Content-Type": {mediaType}}
	switch {
	case o.IfExists:
		h.Set("If-Match", "*")
	case o.IfMatch != nil:
		h.Set("If-Match", `""`) // matches nothing
		for _, d := range o.IfMatch {
			h.Add("If-Match", etag(d))
		}
	}
	if o.KeepTags {
		if c.o.Dialect.KeepTags == "" {
			return PutResult{}, fmt.Errorf("%w: a push of %s of %s that moves no tag, to a registry that can't be asked for that", ErrUnsupported, ref, repo)
		}
		h.Set(c.o.Dialect.KeepTags, "true")
	}
	if o.IfAbsent {
		h.Set("If-None-Match", "*")
	}
	for _, d := range o.IfNoneMatch {
		h.Add("If-None-Match", etag(d))
	}
	got, err := c.Call(ctx, Request{Method: http.MethodPut, To: manifestPath(repo, ref), Query: url.Values{"tag": o.Tags}, Header: h, Body: bytes.NewReader(raw), Length: int64(len(raw))}, http.StatusCreated)
	if err != nil {
		return PutResult{}, err
	}
	res := PutResult{Tags: got.Values("OCI-Tag")}
	if res.Digest, err = putDigest(ref, raw, got.Get("Docker-Content-Digest")); err != nil {
		return PutResult{}, fmt.Errorf("%w: put manifest %s of %s: answer: %w", ErrUnavailable, ref, repo, err)
	}
	if s := got.Get("OCI-Subject"); s != "" {
		if res.Subject, err = parseDigest(s); err != nil {
			return PutResult{}, fmt.Errorf("%w: put manifest %s of %s: answer: %w", ErrUnavailable, ref, repo, err)
		}
	}
	return res, nil
}

// putDigest returns the digest of a manifest that was put: what the registry says, else what it was put as.
func putDigest(ref Reference, raw []byte, says string) (digest.Digest, error) {
	if says != "" {
		return parseDigest(says)
	}
	if ref.Digest != "" {
		return ref.Digest, nil
	}
	return digest.FromBytes(raw), nil
}

// DeleteManifest implements ManifestWriter by DELETE.
func (c *Client) DeleteManifest(ctx context.Context, repo string, ref Reference) error {
	_, err := c.Call(ctx, Request{Method: http.MethodDelete, To: manifestPath(repo, ref)}, http.StatusAccepted)
	return err
}

func (p Page) query() url.Values {
	q := url.Values{}
	if p.N >= 0 {
		q.Set("n", strconv.Itoa(p.N))
	}
	if p.Last != "" {
		q.Set("last", p.Last)
	}
	return q
}

// ListTags implements Tags: one page.
func (c *Client) ListTags(ctx context.Context, repo string, p Page) (Names, error) {
	var l tagList
	h, err := c.CallJSON(ctx, Request{Method: http.MethodGet, To: tagsPath(repo), Query: p.query()}, &l, http.StatusOK)
	return named(l.Tags, h), err
}

// named returns a page of names. The next one begins after the last name, or where the registry says.
func named(names []string, h http.Header) Names {
	q, more := nextPage(h.Values("Link"))
	n := Names{Names: names, More: more}
	if last := q.Get("last"); len(names) == 0 || last != names[len(names)-1] {
		n.Next = last
	}
	return n
}

// ListRepositories implements Catalog: one page.
func (c *Client) ListRepositories(ctx context.Context, p Page) (Names, error) {
	var l repositoryList
	h, err := c.CallJSON(ctx, Request{Method: http.MethodGet, To: route{kind: "catalog"}.endpoint(), Query: p.query()}, &l, http.StatusOK)
	return named(l.Repositories, h), err
}

// ListReferrers implements Referrers: one page. The cursor is the last of the Link to the next page.
func (c *Client) ListReferrers(ctx context.Context, repo string, d digest.Digest, artifactType, cursor string) (ReferrersPage, error) {
	q := url.Values{}
	if artifactType != "" {
		q.Set("artifactType", artifactType)
	}
	if cursor != "" {
		q.Set("last", cursor)
	}
	var idx v1.Index
	h, err := c.CallJSON(ctx, Request{Method: http.MethodGet, To: referrersPath(repo, d), Query: q}, &idx, http.StatusOK)
	if err != nil {
		return ReferrersPage{}, err
	}
	p := ReferrersPage{Descriptors: idx.Manifests, Filtered: h.Get("OCI-Filters-Applied") != ""}
	if next, ok := nextPage(h.Values("Link")); ok {
		if p.Next = next.Get("last"); p.Next == "" {
			return p, fmt.Errorf("%w: referrers of %s in %s: the link to the next page has no last", ErrUnavailable, d, repo)
		}
	}
	return p, nil
}
