package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/transport"
)

// StatBlob implements Blobs by HEAD.
func (c *Client) StatBlob(ctx context.Context, repo string, d digest.Digest) (v1.Descriptor, error) {
	return c.StatAt(ctx, blobPath(repo, d), d)
}

// StatAt returns the size of the bytes of d at an endpoint, by HEAD. ErrUnavailable when the answer has no length.
func (c *Client) StatAt(ctx context.Context, to Endpoint, d digest.Digest) (v1.Descriptor, error) {
	resp, err := c.Do(ctx, Request{Method: http.MethodHead, To: to}, http.StatusOK)
	if err != nil {
		// HEAD has no body: a bare 404 is the blob's.
		if errors.Is(err, ErrBlobUnknown) {
			err = fmt.Errorf("%w: %s", ErrBlobUnknown, d)
		}
		return v1.Descriptor{}, err
	}
	resp.Body.Close()
	if resp.ContentLength < 0 {
		return v1.Descriptor{}, fmt.Errorf("%w: HEAD %s: answer without Content-Length", ErrUnavailable, to.path)
	}
	return v1.Descriptor{MediaType: octets, Digest: d, Size: resp.ContentLength}, nil
}

// OpenBlob implements Blobs by GET of the hinted range, in one round trip. Reading elsewhere sends another request.
func (c *Client) OpenBlob(ctx context.Context, repo string, d digest.Digest, hint Range) (*Content, error) {
	return c.OpenAt(ctx, blobPath(repo, d), d, hint)
}

// OpenAt opens the bytes of d at an endpoint for reading, as OpenBlob does. ctx bounds the life of the Content.
func (c *Client) OpenAt(ctx context.Context, to Endpoint, d digest.Digest, hint Range) (*Content, error) {
	b := &remoteBody{c: c, ctx: ctx, to: to}
	if err := b.get(hint); err != nil {
		return nil, err
	}
	return &Content{Digest: d, Size: b.size, Body: b, Close: b.Close, Plan: b.reads}, nil
}

// remoteBody reads a blob at another registry. It verifies lengths and not the digest. One goroutine reads; Close may
// be called by another.
type remoteBody struct {
	c    *Client
	ctx  context.Context
	to   Endpoint
	size int64

	mu     sync.Mutex // Close may come while a Read waits
	resp   *http.Response
	closed bool

	at    int64 // where resp's body stands
	end   int64 // where it ends
	skips bool  // the other side ignores Range: what is before pos is read and thrown away
	pos   int64 // where the reader wants to be
	plan  []Range
}

// reads implements Content.Plan.
func (b *remoteBody) reads(plan []Range) { b.plan = plan }

func (b *remoteBody) get(r Range) error {
	q := Request{Method: http.MethodGet, To: b.to}
	if r != Whole {
		v := fmt.Sprintf("bytes=%d-", r.Offset)
		if r.Length > 0 {
			v += strconv.FormatInt(r.Offset+r.Length-1, 10)
		}
		q.Header = http.Header{"Range": {v}}
	}
	resp, err := b.c.Do(b.ctx, q, http.StatusOK, http.StatusPartialContent, http.StatusRequestedRangeNotSatisfiable)
	if err != nil {
		return err
	}
	if resp.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		resp.Body.Close()
		size, err := strconv.ParseInt(strings.TrimPrefix(resp.Header.Get("Content-Range"), "bytes */"), 10, 64)
		if err != nil {
			return fmt.Errorf("%w: GET %s: 416 without the blob's size", ErrUnavailable, b.to.path)
		}
		if r.Offset < size {
			return fmt.Errorf("%w: GET %s: 416 for byte %d of %d", ErrUnavailable, b.to.path, r.Offset, size)
		}
		b.size = size // the reader finds out that there is nothing there
		return nil
	}
	b.at, b.size = 0, resp.ContentLength
	b.end = b.size
	b.skips = r != Whole && resp.StatusCode == http.StatusOK
	if resp.StatusCode == http.StatusPartialContent {
		first, last, total, err := parseResponseRange(resp.Header.Get("Content-Range"))
		if err != nil {
			resp.Body.Close()
			return fmt.Errorf("%w: GET %s: %w", ErrUnavailable, b.to.path, err)
		}
		b.at, b.end, b.size = first, last+1, total
	}
	if err := b.lengths(resp); err != nil {
		resp.Body.Close()
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		resp.Body.Close()
		return errBodyClosed
	}
	b.resp = resp
	return nil
}

// lengths compares what an answer says of its length with the range that it is of, and asks for the blob's size where a
// whole blob comes without one.
func (b *remoteBody) lengths(resp *http.Response) error {
	if b.size < 0 {
		desc, err := b.c.StatAt(b.ctx, b.to, "")
		if err != nil {
			return err
		}
		b.size, b.end = desc.Size, desc.Size
	}
	if n := resp.ContentLength; n >= 0 && n != b.end-b.at {
		return fmt.Errorf("%w: GET %s: %d bytes of the range %d-%d", ErrUnavailable, b.to.path, n, b.at, b.end-1)
	}
	return nil
}

// more is an error where an answer without a length goes on after its end.
func (b *remoteBody) more(resp *http.Response) error {
	if resp.ContentLength >= 0 {
		return nil // net/http cuts it
	}
	var one [1]byte
	if n, _ := io.ReadFull(resp.Body, one[:]); n > 0 {
		return fmt.Errorf("%w: GET %s: more than the %d bytes that were announced", ErrUnavailable, b.to.path, b.end)
	}
	return nil
}

var errBodyClosed = errors.New("blob body is closed")

// current returns the response to read from, or nil when another request is needed. It takes b.mu.
func (b *remoteBody) current() (*http.Response, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, errBodyClosed
	}
	ahead := b.pos - b.at // of what the answer has
	near := ahead >= 0 && b.pos < b.end && (ahead <= readThrough || b.skips)
	elsewhere := ahead != 0 && !near
	if b.resp != nil && (elsewhere || b.at >= b.end) {
		b.resp.Body.Close() // asked for elsewhere
		b.resp = nil
	}
	return b.resp, nil
}

// parseResponseRange reads "bytes 0-99/1000".
func parseResponseRange(h string) (first, last, total int64, err error) {
	_, size, _ := strings.Cut(h, "/")
	first, last, err = parseContentRange(h)
	if err == nil {
		total, err = strconv.ParseInt(size, 10, 64)
	}
	if err != nil || last >= total {
		return 0, 0, 0, fmt.Errorf("unreadable Content-Range %.60q", h)
	}
	return first, last, total, nil
}

// Seek implements io.Seeker. It sends nothing; the next Read does.
func (b *remoteBody) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		off += b.pos
	case io.SeekEnd:
		off += b.size
	}
	if off < 0 {
		return 0, fmt.Errorf("seek %s to %d: before its start", b.to.path, off)
	}
	b.pos = off
	return off, nil
}

func (b *remoteBody) Read(p []byte) (int, error) {
	if b.pos >= b.size {
		return 0, io.EOF
	}
	resp, err := b.current()
	if err != nil {
		return 0, err
	}
	if resp == nil {
		size := b.size
		if err := b.get(run(b.plan, b.pos)); err != nil {
			return 0, err
		}
		if resp, err = b.current(); err != nil {
			return 0, err
		}
		switch {
		case b.size != size:
			return 0, fmt.Errorf("%w: GET %s: it changed from %d to %d bytes", ErrUnavailable, b.to.path, size, b.size)
		case resp == nil:
			return 0, fmt.Errorf("%w: GET %s: the answer does not begin at byte %d", ErrUnavailable, b.to.path, b.pos)
		}
	}
	n, err := b.read(resp.Body, p)
	if errors.Is(err, transport.ErrNoProgress) {
		b.c.reached(false)
	}
	if err == io.EOF {
		if b.at < b.end {
			return n, fmt.Errorf("GET %s: %w at byte %d of %d", b.to.path, io.ErrUnexpectedEOF, b.at, b.end)
		}
		err = nil
	}
	if err == nil && n > 0 && b.at == b.end {
		err = b.more(resp)
	}
	return n, err
}

// read reads from body at b.pos, and throws away what the answer has before that.
func (b *remoteBody) read(body io.Reader, p []byte) (n int, err error) {
	if b.at < b.pos {
		skipped, err := io.CopyN(io.Discard, body, b.pos-b.at)
		b.at += skipped
		if err != nil {
			return 0, err
		}
	}
	n, err = body.Read(p[:min(int64(len(p)), b.end-b.at)])
	b.at += int64(n)
	b.pos = b.at
	return n, err
}

// Close ends the request under way, also while a Read waits. The connection is used again only if the answer was read
// to its end.
func (b *remoteBody) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	if b.resp == nil {
		return nil
	}
	err := b.resp.Body.Close()
	b.resp = nil
	return err
}

// DeleteBlob implements BlobDeleter by DELETE.
func (c *Client) DeleteBlob(ctx context.Context, repo string, d digest.Digest) error {
	_, err := c.Call(ctx, Request{Method: http.MethodDelete, To: blobPath(repo, d)}, http.StatusAccepted)
	return err
}

// MountBlob implements Mounter by POST with mount and from. On 202, when there is nothing to mount, it ends the session
// that came instead and returns ErrBlobUnknown. The Size of its descriptor is 0.
func (c *Client) MountBlob(ctx context.Context, repo, from string, d digest.Digest) (v1.Descriptor, error) {
	q := url.Values{"mount": {d.String()}}
	if from != "" {
		q.Set("from", from)
	}
	resp, err := c.Do(ctx, Request{Method: http.MethodPost, To: uploadsPath(repo), Query: q}, http.StatusCreated, http.StatusAccepted)
	if err != nil {
		return v1.Descriptor{}, err
	}
	resp.Body.Close()
	if resp.StatusCode == http.StatusCreated {
		return v1.Descriptor{MediaType: octets, Digest: d}, nil
	}
	err = fmt.Errorf("%w: %s can't be mounted from %q", ErrBlobUnknown, d, from)
	if u, ok := c.uploadOf(resp, uploadsPath(repo), 0); ok {
		err = errors.Join(err, c.AbortUpload(ctx, repo, u.ID))
	}
	return v1.Descriptor{}, err
}
