package registry

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/transport"
)

// Client speaks to one registry and implements the interfaces of this package over HTTP. Errors of the table come back
// as the same values; what could not be reached is ErrUnavailable. It is safe for concurrent use.
type Client struct {
	base string // scheme://host, no slash at the end
	hc   *http.Client
	o    ClientOptions
}

// ClientOptions are what a Client does beyond the specification. The zero value is nothing.
type ClientOptions struct {
	Dialect Dialect
	// Reached, where set, is called after each request with whether the registry could be reached, and with false when
	// the body of an answer stood still for too long.
	Reached func(bool)
}

// NewClient returns a client of the registry at a URL without /v2/, which speaks the specification alone.
func NewClient(base string, hc *http.Client) (*Client, error) {
	return NewClientWith(base, hc, ClientOptions{})
}

// NewClientWith is NewClient with options.
func NewClientWith(base string, hc *http.Client, o ClientOptions) (*Client, error) {
	u, err := url.Parse(base)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		return nil, fmt.Errorf("%q is no URL of a registry: want http://host:port", base)
	}
	return &Client{base: strings.TrimSuffix(base, "/"), hc: hc, o: o}, nil
}

// Base returns the URL of the registry, without a slash at its end.
func (c *Client) Base() string { return c.base }

func (c *Client) reached(ok bool) {
	if c.o.Reached != nil {
		c.o.Reached(ok)
	}
}

// maxErrorBody bounds what is read of an error, maxList of a list.
const (
	maxErrorBody = 64 << 10
	maxList      = 16 << 20
)

// Request is one request of a Client, for what the interfaces of this package have no method for.
type Request struct {
	Method string
	To     Endpoint
	Query  url.Values
	Header http.Header
	Body   io.Reader
	Length int64 // of Body in bytes, -1 when not known
}

// Do sends a request and returns the response when its status is one of want; the caller closes its body.
func (c *Client) Do(ctx context.Context, q Request, want ...int) (*http.Response, error) {
	if q.To.err != nil || q.To.path == "" {
		return nil, fmt.Errorf("%s: %w", q.Method, cmp.Or(q.To.err, error(ErrInternal)))
	}
	u := c.base + q.To.path
	if len(q.Query) > 0 {
		u += "?" + q.Query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, q.Method, u, q.Body)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", q.Method, q.To.path, err)
	}
	if q.Body != nil {
		req.ContentLength = q.Length
		if q.Length == 0 {
			req.Body = http.NoBody
		}
	}
	for k, v := range q.Header {
		req.Header[k] = v
	}
	if c.o.Dialect.Decorate != nil {
		c.o.Dialect.Decorate(req)
	}
	resp, err := c.hc.Do(req)
	if err != nil {
		if ctx.Err() == nil {
			c.reached(false)
		}
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, &url.Error{Op: q.Method, URL: u, Err: unwrapURL(err)})
	}
	c.reached(true)
	for _, s := range want {
		if resp.StatusCode == s {
			return resp, nil
		}
	}
	defer resp.Body.Close()
	err = c.o.Dialect.decodeError(resp)
	if resp.StatusCode < http.StatusInternalServerError {
		return nil, err // the caller's mistake is passed on to who made it, who need not know where this registry asked
	}
	return nil, &url.Error{Op: q.Method, URL: u, Err: err} // which answers to clients leave out
}

// unwrapURL drops the URL that net/http puts into errors: it is named already.
func unwrapURL(err error) error {
	var ue *url.Error
	if errors.As(err, &ue) {
		return ue.Err
	}
	return err
}

// Call is Do for answers without a body that matters.
func (c *Client) Call(ctx context.Context, q Request, want ...int) (http.Header, error) {
	resp, err := c.Do(ctx, q, want...)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	// Read to the end, so that the connection is used again.
	_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, maxErrorBody))
	return resp.Header, err
}

// CallJSON is Do for JSON answers of bounded size.
func (c *Client) CallJSON(ctx context.Context, q Request, into any, want ...int) (http.Header, error) {
	resp, err := c.Do(ctx, q, want...)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxList)).Decode(into); err != nil {
		return nil, fmt.Errorf("%w: %s %s: answer: %w", ErrUnavailable, q.Method, q.To.path, err)
	}
	return resp.Header, nil
}

// remoteError is an error of the table as another registry said it.
type remoteError struct {
	kind    *Error
	message string
}

func (e *remoteError) Error() string { return e.message }
func (e *remoteError) Unwrap() error { return e.kind }

// decodeError turns a response back into the error that made it.
func (d Dialect) decodeError(resp *http.Response) error {
	var body errorBody
	b, rerr := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	jerr := json.Unmarshal(b, &body)
	var code, message string
	if rerr == nil && jerr == nil && len(body.Errors) > 0 {
		code, message = body.Errors[0].Code, body.Errors[0].Message
	}
	kind := lookup(code, resp.StatusCode)
	if message == "" {
		message = fmt.Sprintf("%s (%s)", kind.Message, resp.Status)
	}
	var err error = &remoteError{kind, message}
	if kind == ErrRangeInvalid {
		if u, ok := d.uploadOf(resp.Header); ok {
			return &RangeError{Upload: u, Got: -1}
		}
	}
	if s, perr := strconv.Atoi(resp.Header.Get("Retry-After")); perr == nil && s >= 0 {
		return &RetryError{Err: err, After: time.Duration(s) * time.Second}
	}
	return err
}

func lookup(code string, status int) *Error {
	for _, e := range table {
		if e.Code == code && e.Status == status {
			return e
		}
	}
	if status >= 500 && status != http.StatusInsufficientStorage && status != http.StatusInternalServerError {
		return ErrUnavailable
	}
	for _, e := range table {
		if e.Status == status {
			return e
		}
	}
	return ErrInternal
}

// uploadOf reads a session from Location and Range. A session without bytes also says 0-0; one of a single byte can't
// be told from it, which the dialect's Offset does.
func (d Dialect) uploadOf(h http.Header) (Upload, bool) {
	_, id, ok := cutLast(h.Get("Location"))
	if !ok || !sessionID(id) {
		return Upload{}, false
	}
	if n, err := strconv.ParseInt(d.get(h, d.Offset), 10, 64); err == nil && n >= 0 {
		return Upload{id, n}, true
	}
	_, last, err := parseContentRange(h.Get("Range"))
	if err != nil {
		return Upload{}, false
	}
	if last == 0 {
		return Upload{id, 0}, true
	}
	return Upload{id, last + 1}, true
}

// Ping asks GET /v2/.
func (c *Client) Ping(ctx context.Context) error {
	_, err := c.Call(ctx, Request{Method: http.MethodGet, To: route{}.endpoint()}, http.StatusOK)
	return err
}

// StatBlob is HEAD.
func (c *Client) StatBlob(ctx context.Context, repo string, d digest.Digest) (v1.Descriptor, error) {
	return c.StatAt(ctx, blobPath(repo, d), d)
}

// StatAt is HEAD of where a blob's bytes are.
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

// OpenBlob asks for the hinted range at once, one round trip; reading elsewhere asks again.
func (c *Client) OpenBlob(ctx context.Context, repo string, d digest.Digest, hint Range) (*Content, error) {
	return c.OpenAt(ctx, blobPath(repo, d), d, hint)
}

// OpenAt is OpenBlob of where a blob's bytes are.
func (c *Client) OpenAt(ctx context.Context, to Endpoint, d digest.Digest, hint Range) (*Content, error) {
	b := &remoteBody{c: c, ctx: ctx, to: to}
	if err := b.get(hint); err != nil {
		return nil, err
	}
	return &Content{Digest: d, Size: b.size, Body: b, Close: b.Close, Plan: b.reads}, nil
}

// remoteBody is a blob at another registry. It verifies nothing, but a short body is an error.
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

// reads is Content.Plan.
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
	if b.size < 0 {
		resp.Body.Close()
		return fmt.Errorf("%w: GET %s: answer without Content-Length", ErrUnavailable, b.to.path)
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

var errBodyClosed = errors.New("blob body is closed")

// current is the response to read from, nil when another has to be asked for.
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

// Seek moves no bytes; the next Read does.
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
	return n, err
}

// read reads at pos; what the answer has before that is thrown away.
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

// Close ends the request under way, also while a Read waits. A body that was read to its end has given its connection
// back.
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

// DeleteBlob is DELETE.
func (c *Client) DeleteBlob(ctx context.Context, repo string, d digest.Digest) error {
	_, err := c.Call(ctx, Request{Method: http.MethodDelete, To: blobPath(repo, d)}, http.StatusAccepted)
	return err
}

// MountBlob is POST with mount and from; a 202 means that there is nothing to mount.
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
	if u, ok := c.o.Dialect.uploadOf(resp.Header); ok {
		err = errors.Join(err, c.AbortUpload(ctx, repo, u.ID))
	}
	return v1.Descriptor{}, err
}

// StartUpload is POST; what is known goes as hints.
func (c *Client) StartUpload(ctx context.Context, repo string, o UploadOptions) (Upload, error) {
	h := http.Header{}
	c.o.Dialect.hint(h, o)
	return c.session(ctx, Request{Method: http.MethodPost, To: uploadsPath(repo), Header: h}, http.StatusAccepted)
}

func (c *Client) session(ctx context.Context, q Request, want int) (Upload, error) {
	h, err := c.Call(ctx, q, want)
	if err != nil {
		return Upload{}, err
	}
	u, ok := c.o.Dialect.uploadOf(h)
	if !ok {
		return Upload{}, fmt.Errorf("%w: %s %s: answer without Location and Range", ErrUnavailable, q.Method, q.To.path)
	}
	return u, nil
}

// UploadStatus is GET.
func (c *Client) UploadStatus(ctx context.Context, repo, id string) (Upload, error) {
	return c.session(ctx, Request{Method: http.MethodGet, To: uploadPath(repo, id)}, http.StatusNoContent)
}

// WriteUpload is PATCH.
func (c *Client) WriteUpload(ctx context.Context, repo, id string, k Chunk) (Upload, error) {
	q := Request{Method: http.MethodPatch, To: uploadPath(repo, id), Header: c.o.Dialect.chunkHeader(k), Body: k.Body, Length: k.Length}
	u, err := c.session(ctx, q, http.StatusAccepted)
	return u, gotOffset(err, k)
}

// CommitUpload is PUT with the last chunk, if any.
func (c *Client) CommitUpload(ctx context.Context, repo, id string, d digest.Digest, k Chunk) (v1.Descriptor, error) {
	q := Request{Method: http.MethodPut, To: uploadPath(repo, id), Query: url.Values{"digest": {d.String()}}, Body: k.Body, Length: k.Length}
	if k.Body != nil {
		q.Header = c.o.Dialect.chunkHeader(k)
	}
	h, err := c.Call(ctx, q, http.StatusCreated)
	if err != nil {
		return v1.Descriptor{}, gotOffset(err, k)
	}
	desc := v1.Descriptor{MediaType: octets, Digest: d}
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

// gotOffset completes a RangeError, which the answer knows only half of.
func gotOffset(err error, k Chunk) error {
	var re *RangeError
	if errors.As(err, &re) {
		re.Got = k.Offset
	}
	return err
}

// AbortUpload is DELETE.
func (c *Client) AbortUpload(ctx context.Context, repo, id string) error {
	_, err := c.Call(ctx, Request{Method: http.MethodDelete, To: uploadPath(repo, id)}, http.StatusNoContent)
	return err
}
