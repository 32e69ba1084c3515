package registry

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
)

// Client speaks to one registry and implements the interfaces of this package over HTTP. Errors of the table come back
// as the same values; what could not be reached is ErrUnavailable. It is safe for concurrent use.
type Client struct {
	base string   // scheme://host, no slash at the end
	url  *url.URL // the same
	hc   *http.Client
	o    ClientOptions
	key  [32]byte // of the ids of sessions whose Location has more than an id
}

// ClientOptions are how a Client speaks.
type ClientOptions struct {
	// Dialect is what requests and answers may have beyond the specification.
	Dialect Dialect
	// Reached, where set, is called after each request with whether the registry could be reached, and with false when
	// the body of an answer stood still for too long.
	Reached func(bool)
	// Elsewhere is how many redirects of one read are followed, and whether an upload may go on at another host, which
	// is sent neither credentials nor what the Dialect adds. 0: an answer that leads to another place is an error.
	Elsewhere int
}

// maxRedirects is ClientOptions.Elsewhere of NewClient.
const maxRedirects = 5

// NewClient returns a client of the registry at a URL without /v2/, any registry: it speaks the specification alone,
// and follows redirects.
func NewClient(base string, hc *http.Client) (*Client, error) {
	return NewClientWith(base, hc, ClientOptions{Elsewhere: maxRedirects})
}

// NewClientWith is NewClient with options.
func NewClientWith(base string, hc *http.Client, o ClientOptions) (*Client, error) {
	u, err := url.Parse(base)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		return nil, fmt.Errorf("%q is no URL of a registry: want http://host:port", base)
	}
	own := *hc // whatever it does with redirects, they are followed here
	own.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	c := &Client{base: strings.TrimSuffix(base, "/"), url: u, hc: &own, o: o}
	rand.Read(c.key[:]) // never fails
	return c, nil
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
	if q.To.location != "" {
		u = q.To.location
	}
	if len(q.Query) > 0 {
		sep := "?"
		if strings.Contains(u, "?") {
			sep = "&" // a Location's own query stays as it is
		}
		u += sep + q.Query.Encode()
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
	if own := sameHost(req.URL, c.url); own && c.o.Dialect.Decorate != nil {
		c.o.Dialect.Decorate(req)
	} else if !own {
		keepHeaders(req.Header)
	}
	resp, err := c.follow(req)
	if err != nil {
		if ctx.Err() == nil && !errors.Is(err, errRedirect) {
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
	err = c.decodeError(resp, q.To)
	if resp.StatusCode < http.StatusInternalServerError {
		return nil, err // the caller's mistake is passed on to who made it, who need not know where this registry asked
	}
	return nil, &url.Error{Op: q.Method, URL: u, Err: err} // which answers to clients leave out
}

// unwrapURL returns err without the URL that net/http adds: the caller names it.
func unwrapURL(err error) error {
	var ue *url.Error
	if errors.As(err, &ue) {
		return ue.Err
	}
	return err
}

// Call is Do for answers whose body does not matter. It returns the header.
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

// CallJSON is Do for JSON answers of at most 16 MiB, which it decodes. It returns the header.
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

// Ping returns nil when GET /v2/ answers 200.
func (c *Client) Ping(ctx context.Context) error {
	_, err := c.Call(ctx, Request{Method: http.MethodGet, To: route{}.endpoint()}, http.StatusOK)
	return err
}
