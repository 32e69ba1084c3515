package registry

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/blob"
)

// manifestAccept asks for whatever is stored.
var manifestAccept = []string{strings.Join([]string{v1.MediaTypeImageManifest, v1.MediaTypeImageIndex, MediaTypeDockerManifest, MediaTypeDockerManifestList, "*/*"}, ", ")}

// GetManifest is GET, conditional when the caller has one already. Bytes that are not what was asked for are
// ErrUnavailable.
func (c *Client) GetManifest(ctx context.Context, repo string, ref Reference, o GetOptions) (*Manifest, error) {
	h := http.Header{"Accept": manifestAccept}
	if o.Have != "" {
		h.Set("If-None-Match", etag(o.Have))
	}
	resp, err := c.do(ctx, request{method: http.MethodGet, to: manifestPath(repo, ref), header: h}, http.StatusOK, http.StatusNotModified)
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

// PutManifest is PUT.
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
	if o.IfAbsent {
		h.Set("If-None-Match", "*")
	}
	for _, d := range o.IfNoneMatch {
		h.Add("If-None-Match", etag(d))
	}
	got, err := c.call(ctx, request{method: http.MethodPut, to: manifestPath(repo, ref), query: url.Values{"tag": o.Tags}, header: h, body: bytes.NewReader(raw), length: int64(len(raw))}, http.StatusCreated)
	if err != nil {
		return PutResult{}, err
	}
	res := PutResult{Tags: got.Values("OCI-Tag")}
	if res.Digest, err = parseDigest(got.Get("Docker-Content-Digest")); err != nil {
		return PutResult{}, fmt.Errorf("%w: put manifest %s of %s: answer: %w", ErrUnavailable, ref, repo, err)
	}
	if s := got.Get("OCI-Subject"); s != "" {
		if res.Subject, err = parseDigest(s); err != nil {
			return PutResult{}, fmt.Errorf("%w: put manifest %s of %s: answer: %w", ErrUnavailable, ref, repo, err)
		}
	}
	return res, nil
}

// DeleteManifest is DELETE.
func (c *Client) DeleteManifest(ctx context.Context, repo string, ref Reference) error {
	_, err := c.call(ctx, request{method: http.MethodDelete, to: manifestPath(repo, ref)}, http.StatusAccepted)
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

// ListTags is one page.
func (c *Client) ListTags(ctx context.Context, repo string, p Page) (Names, error) {
	var l tagList
	h, err := c.callJSON(ctx, request{method: http.MethodGet, to: tagsPath(repo), query: p.query()}, &l, http.StatusOK)
	return Names{l.Tags, h.Get("Link") != ""}, err
}

// ListRepositories is one page.
func (c *Client) ListRepositories(ctx context.Context, p Page) (Names, error) {
	var l repositoryList
	h, err := c.callJSON(ctx, request{method: http.MethodGet, to: route{kind: "catalog"}.endpoint(), query: p.query()}, &l, http.StatusOK)
	return Names{l.Repositories, h.Get("Link") != ""}, err
}

// ListReferrers is one page.
func (c *Client) ListReferrers(ctx context.Context, repo string, d digest.Digest, artifactType, cursor string) (ReferrersPage, error) {
	q := url.Values{}
	if artifactType != "" {
		q.Set("artifactType", artifactType)
	}
	if cursor != "" {
		q.Set("last", cursor)
	}
	var idx v1.Index
	h, err := c.callJSON(ctx, request{method: http.MethodGet, to: referrersPath(repo, d), query: q}, &idx, http.StatusOK)
	if err != nil {
		return ReferrersPage{}, err
	}
	p := ReferrersPage{Descriptors: idx.Manifests, Filtered: h.Get("OCI-Filters-Applied") != ""}
	if link := h.Get("Link"); link != "" {
		target, _, _ := strings.Cut(strings.TrimPrefix(link, "<"), ">")
		if u, err := url.Parse(target); err == nil {
			p.Next = u.Query().Get("last")
		}
	}
	return p, nil
}

// LocalStat asks an origin for what is on its own disk, and nowhere else.
func (c *Client) LocalStat(ctx context.Context, repo string, d digest.Digest) (v1.Descriptor, error) {
	return c.stat(ctx, extensionPath(repo, "blobs", d), d)
}

// LocalOpen reads what is on an origin's own disk.
func (c *Client) LocalOpen(ctx context.Context, repo string, d digest.Digest, hint Range) (*Content, error) {
	return c.open(ctx, extensionPath(repo, "blobs", d), d, hint)
}

// Replicate gives an origin a copy. With writeback it owes the bucket the blob too.
func (c *Client) Replicate(ctx context.Context, repo string, d digest.Digest, size int64, writeback bool, r io.Reader) error {
	h := http.Header{"Content-Type": {octets}}
	if writeback {
		h.Set("Kraken-Writeback", "true")
	}
	_, err := c.call(ctx, request{method: http.MethodPut, to: extensionPath(repo, "blobs", d), header: h, body: r, length: size}, http.StatusOK, http.StatusCreated)
	return err
}

// Metainfo asks an origin. ErrUnavailable, with a time to retry, while it is being computed.
func (c *Client) Metainfo(ctx context.Context, repo string, d digest.Digest) (*blob.Metainfo, error) {
	to := extensionPath(repo, "metainfo", d)
	resp, err := c.do(ctx, request{method: http.MethodGet, to: to}, http.StatusOK)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, MaxMetainfo+1))
	if err != nil {
		return nil, fmt.Errorf("%w: read metainfo of %s: %w", ErrUnavailable, d, err)
	}
	m, err := blob.ParseMetainfo(b)
	if err == nil && m.Digest != d {
		err = fmt.Errorf("it is of %s", m.Digest)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: GET %s: %w", ErrUnavailable, to.path, err)
	}
	return m, nil
}

// DropMetainfo makes an origin compute a blob's metainfo again.
func (c *Client) DropMetainfo(ctx context.Context, repo string, d digest.Digest) error {
	_, err := c.call(ctx, request{method: http.MethodDelete, to: extensionPath(repo, "metainfo", d)}, http.StatusAccepted)
	return err
}

// PeerHeader is the peer id of an agent in its reads of ranges, so that an origin knows who fetches what it leases.
const PeerHeader = "Kraken-Peer"

type peerKey struct{}

// WithPeer makes requests with this context say which agent reads.
func WithPeer(ctx context.Context, peer string) context.Context {
	return context.WithValue(ctx, peerKey{}, peer)
}

// Lease asks an origin for pieces to fetch now.
func (c *Client) Lease(ctx context.Context, repo string, d digest.Digest, l LeaseRequest) (LeaseResponse, error) {
	var out LeaseResponse
	return out, c.post(ctx, extensionPath(repo, "lease", d), l, &out)
}

func (c *Client) post(ctx context.Context, to endpoint, in, out any) error {
	body, n, err := jsonBody(in)
	if err != nil {
		return err
	}
	_, err = c.callJSON(ctx, request{method: http.MethodPost, to: to, header: jsonType, body: body, length: n}, out, http.StatusOK)
	return err
}

var jsonType = http.Header{"Content-Type": {"application/json"}}

// Durable asks an origin which blobs are in the bucket of the repository.
func (c *Client) Durable(ctx context.Context, repo string, ds []digest.Digest) (DurableResponse, error) {
	var out DurableResponse
	return out, c.post(ctx, resourcePath(repo, "durable"), DurableRequest{ds}, &out)
}

// PutName makes an origin keep a record, durably.
func (c *Client) PutName(ctx context.Context, r NameRecord) error {
	body, n, err := jsonBody(r)
	if err != nil {
		return err
	}
	_, err = c.call(ctx, request{method: http.MethodPut, to: recordPath(r.Repository, NameKey(r)), header: jsonType, body: body, length: n}, http.StatusOK, http.StatusCreated)
	return err
}

// DeleteName makes an origin forget the record of a key, if it is of this generation or an older one.
func (c *Client) DeleteName(ctx context.Context, d NameDeletion) error {
	q := url.Values{"generation": {strconv.FormatInt(d.Generation, 10)}}
	if len(d.Signature) > 0 {
		q.Set("signature", base64.RawURLEncoding.EncodeToString(d.Signature))
	}
	_, err := c.call(ctx, request{method: http.MethodDelete, to: recordPath(d.Repository, d.Key), query: q}, http.StatusAccepted)
	return err
}

// Names calls fn with the JSON of every record that an origin keeps, unchecked: ParseNameRecord reads it. The bytes are
// fn's until it returns.
func (c *Client) Names(ctx context.Context, fn func(line []byte) error) error {
	return lines(ctx, c, resourcePath("", "names"), fn)
}

// Pending calls fn for every blob that an origin has not written back.
func (c *Client) Pending(ctx context.Context, fn func(PendingBlob) error) error {
	to := resourcePath("", "pending")
	return lines(ctx, c, to, func(line []byte) error {
		var p PendingBlob
		if err := json.Unmarshal(line, &p); err != nil {
			return fmt.Errorf("%w: GET %s: %w", ErrUnavailable, to.path, err)
		}
		return fn(p)
	})
}

// lines reads newline-delimited JSON.
func lines(ctx context.Context, c *Client, to endpoint, fn func(line []byte) error) error {
	resp, err := c.do(ctx, request{method: http.MethodGet, to: to}, http.StatusOK)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	sc := bufio.NewScanner(resp.Body)
	sc.Buffer(nil, 2*MaxNameRecord)
	for sc.Scan() {
		if err := fn(sc.Bytes()); err != nil {
			return err
		}
	}
	if err := sc.Err(); err != nil {
		return fmt.Errorf("%w: GET %s: %w", ErrUnavailable, to.path, err)
	}
	return nil
}

// PutLayer makes a blob a member of a repository.
func (c *Client) PutLayer(ctx context.Context, repo string, l Layer) error {
	body, n, err := jsonBody(l)
	if err != nil {
		return err
	}
	_, err = c.call(ctx, request{method: http.MethodPut, to: extensionPath(repo, "layers", l.Digest), header: jsonType, body: body, length: n}, http.StatusCreated)
	return err
}

// GetLayer is ErrBlobUnknown for what is no member.
func (c *Client) GetLayer(ctx context.Context, repo string, d digest.Digest) (Layer, error) {
	var l Layer
	_, err := c.callJSON(ctx, request{method: http.MethodGet, to: extensionPath(repo, "layers", d)}, &l, http.StatusOK)
	return l, err
}

// DeleteLayer ends a membership.
func (c *Client) DeleteLayer(ctx context.Context, repo string, d digest.Digest) error {
	_, err := c.call(ctx, request{method: http.MethodDelete, to: extensionPath(repo, "layers", d)}, http.StatusAccepted)
	return err
}

// MountLayer makes a member of from, or of any other repository, a member of repo.
func (c *Client) MountLayer(ctx context.Context, repo, from string, d digest.Digest) (Layer, error) {
	q := url.Values{}
	if from != "" {
		q.Set("from", from)
	}
	var l Layer
	_, err := c.callJSON(ctx, request{method: http.MethodPost, to: extensionPath(repo, "mount", d), query: q}, &l, http.StatusCreated)
	return l, err
}

var errNoOrigin = errors.New("no origin is configured")
