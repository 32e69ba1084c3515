package registry

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// StartUpload implements Uploads by POST. What is known of the blob is sent only in a Dialect that has words for it.
func (c *Client) StartUpload(ctx context.Context, repo string, o UploadOptions) (Upload, error) {
	h := http.Header{}
	c.o.Dialect.hint(h, o)
	return c.session(ctx, Request{Method: http.MethodPost, To: uploadsPath(repo), Header: h}, http.StatusAccepted, 0)
}

// session is Do for answers that are a session's state; expect is where it should stand then, -1 when not known.
func (c *Client) session(ctx context.Context, q Request, want int, expect int64) (Upload, error) {
	resp, err := c.Do(ctx, q, want)
	if err != nil {
		return Upload{}, err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, maxErrorBody)); err != nil {
		return Upload{}, fmt.Errorf("%w: %s %s: answer: %w", ErrUnavailable, q.Method, q.To.path, err)
	}
	u, ok := c.uploadOf(resp, q.To, expect)
	if !ok {
		return Upload{}, fmt.Errorf("%w: %s %s: answer without a usable Location and Range", ErrUnavailable, q.Method, q.To.path)
	}
	return u, nil
}

// UploadStatus implements Uploads by GET.
func (c *Client) UploadStatus(ctx context.Context, repo, id string) (Upload, error) {
	return c.session(ctx, Request{Method: http.MethodGet, To: c.uploadPath(repo, id)}, http.StatusNoContent, -1)
}

// WriteUpload implements Uploads by PATCH.
func (c *Client) WriteUpload(ctx context.Context, repo, id string, k Chunk) (Upload, error) {
	q := Request{Method: http.MethodPatch, To: c.uploadPath(repo, id), Header: c.o.Dialect.chunkHeader(k), Body: k.Body, Length: k.Length}
	u, err := c.session(ctx, q, http.StatusAccepted, k.end())
	return u, gotOffset(err, k)
}

// CommitUpload implements Uploads by PUT with the last chunk, if any. The Size of its descriptor is 0 when neither the
// chunk nor the registry tells it.
func (c *Client) CommitUpload(ctx context.Context, repo, id string, d digest.Digest, k Chunk) (v1.Descriptor, error) {
	q := Request{Method: http.MethodPut, To: c.uploadPath(repo, id), Query: url.Values{"digest": {d.String()}}, Body: k.Body, Length: k.Length}
	if k.Body != nil {
		q.Header = c.o.Dialect.chunkHeader(k)
	}
	h, err := c.Call(ctx, q, http.StatusCreated)
	if err != nil {
		return v1.Descriptor{}, gotOffset(err, k)
	}
	desc := v1.Descriptor{MediaType: octets, Digest: d, Size: max(0, k.end())}
	if n, err := strconv.ParseInt(c.o.Dialect.get(h, c.o.Dialect.Size), 10, 64); err == nil {
		desc.Size = n
	}
	return desc, nil
}

func (d Dialect) chunkHeader(k Chunk) http.Header {
	h := http.Header{"Content-Type": {octets}}
	switch {
	case k.Offset >= 0 && k.Length > 0:
		h.Set("Content-Range", fmt.Sprintf("%d-%d", k.Offset, k.Offset+k.Length-1))
	case k.Offset >= 0 && d.Offset != "":
		h.Set(d.Offset, strconv.FormatInt(k.Offset, 10))
	}
	return h
}

// gotOffset sets in a RangeError where the chunk began, which the answer does not say.
func gotOffset(err error, k Chunk) error {
	var re *RangeError
	if errors.As(err, &re) {
		re.Got = k.Offset
	}
	return err
}

// end returns the offset after a chunk, -1 when it is not known.
func (k Chunk) end() int64 {
	if k.Offset < 0 || k.Length < 0 || k.Body == nil {
		return -1
	}
	return k.Offset + k.Length
}

// AbortUpload implements Uploads by DELETE.
func (c *Client) AbortUpload(ctx context.Context, repo, id string) error {
	_, err := c.Call(ctx, Request{Method: http.MethodDelete, To: c.uploadPath(repo, id)}, http.StatusNoContent)
	return err
}

// uploadOf reads a session from an answer to a request of an endpoint. Where the registry does not say how far it is,
// or says 0-0, which both an empty session and one of a single byte do, it is at expect, unless that is negative. A
// dialect's Offset tells the two apart.
func (c *Client) uploadOf(resp *http.Response, to Endpoint, expect int64) (Upload, bool) {
	id, ok := c.sessionAt(resp, to)
	if !ok {
		return Upload{}, false
	}
	h := resp.Header
	if n, err := strconv.ParseInt(c.o.Dialect.get(h, c.o.Dialect.Offset), 10, 64); err == nil && n >= 0 {
		return Upload{id, n}, true
	}
	r := h.Get("Range")
	if r == "" && expect >= 0 {
		return Upload{id, expect}, true
	}
	_, last, err := parseContentRange(r)
	switch {
	case err != nil:
		return Upload{}, false
	case last == 0 && expect != 1:
		return Upload{id, 0}, true
	}
	return Upload{id, last + 1}, true
}

// sealed is how the id of a session begins whose Location is more than a plain session's: a query, another path,
// another host. Then follow a signature and the Location, in base64url. The signature is this Client's: nobody else can
// make it send a request to a place of his choice.
const sealed = "u_"

// maxLocation bounds a Location that is taken, in bytes.
const maxLocation = 8 << 10

// sessionAt returns the id for the Location of an answer, or that of the request where the answer names none.
func (c *Client) sessionAt(resp *http.Response, to Endpoint) (id string, ok bool) {
	loc := resp.Header.Get("Location")
	if loc == "" {
		return to.session, to.session != ""
	}
	if len(loc) > maxLocation || resp.Request == nil {
		return "", false
	}
	u, err := resp.Request.URL.Parse(loc)
	if err != nil {
		return "", false
	}
	u.Fragment = ""
	if _, last, _ := cutLast(u.Path); sameHost(u, c.url) && u.RawQuery == "" && sessionID(last) && !strings.HasPrefix(last, sealed) &&
		u.EscapedPath() == uploadsPath(to.repo).path+last {
		return last, true
	}
	if mayLeave(c.url, u) != nil || c.o.Elsewhere == 0 {
		return "", false
	}
	b := append(c.sign(to.repo, u.String()), u.String()...)
	return sealed + base64.RawURLEncoding.EncodeToString(b), true
}

func (c *Client) sign(repo, location string) []byte {
	m := hmac.New(sha256.New, c.key[:])
	m.Write([]byte(repo + "\x00" + location))
	return m.Sum(nil)[:16]
}

// uploadPath is where a session is, of which sessionAt has made the id.
func (c *Client) uploadPath(repo, id string) Endpoint {
	to := route{"upload", repo, id}.endpoint()
	if text, ok := strings.CutPrefix(id, sealed); ok && c.o.Elsewhere > 0 && CheckName(repo) == nil {
		b, err := base64.RawURLEncoding.DecodeString(text)
		if err != nil || len(b) < 16 || !hmac.Equal(b[:16], c.sign(repo, string(b[16:]))) {
			return Endpoint{err: fmt.Errorf("%w: %.80q", ErrBlobUploadUnknown, id)}
		}
		to = Endpoint{path: "/v2/" + repo + "/blobs/uploads/", kind: "upload", location: string(b[16:])}
	}
	to.repo, to.session = repo, id
	return to
}
