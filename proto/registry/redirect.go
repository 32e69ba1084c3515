package registry

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
)

// errRedirect is an answer that leads to a place where it must not be followed.
var errRedirect = errors.New("redirect is not followed")

// follow sends a request and returns the last answer. Redirects of reads are followed, ClientOptions.Elsewhere of them.
func (c *Client) follow(req *http.Request) (*http.Response, error) {
	for n := 0; ; n++ {
		resp, err := c.hc.Do(req)
		if err != nil || !redirects(resp) || !reads(req) || c.o.Elsewhere == 0 {
			return resp, err
		}
		to, err := req.URL.Parse(resp.Header.Get("Location"))
		if err == nil {
			err = mayLeave(req.URL, to)
		}
		if err == nil && n >= c.o.Elsewhere {
			err = fmt.Errorf("%w: it is number %d", errRedirect, n+1)
		}
		// Read to the end, so that the connection is used again.
		_, rerr := io.Copy(io.Discard, io.LimitReader(resp.Body, maxErrorBody))
		if err = errors.Join(err, rerr, resp.Body.Close()); err != nil {
			return nil, err
		}
		next := req.Clone(req.Context())
		next.URL, next.Host = to, ""
		if !sameHost(to, c.url) {
			keepHeaders(next.Header)
		}
		req = next
	}
}

func redirects(resp *http.Response) bool {
	switch resp.StatusCode {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return resp.Header.Get("Location") != ""
	}
	return false
}

// mayLeave refuses to go from one URL to another that is no http or https, has a user, or is not encrypted where the
// first one was.
func mayLeave(from, to *url.URL) error {
	switch {
	case to.Scheme != "http" && to.Scheme != "https":
		return fmt.Errorf("%w: to scheme %.20q", errRedirect, to.Scheme)
	case to.Host == "" || to.User != nil:
		return fmt.Errorf("%w: to no host, or with a user", errRedirect)
	case from.Scheme == "https" && to.Scheme == "http":
		return fmt.Errorf("%w: from https to http", errRedirect)
	}
	return nil
}

func sameHost(a, b *url.URL) bool {
	return a.Scheme == b.Scheme && strings.EqualFold(a.Host, b.Host)
}

// kept are the headers that another host than the registry's is sent: none that says who asks.
var kept = []string{"Accept", "Range", "If-None-Match", "Content-Type", "Content-Range", "Content-Length"}

func keepHeaders(h http.Header) {
	for name := range h {
		if !slices.Contains(kept, name) {
			delete(h, name)
		}
	}
}
