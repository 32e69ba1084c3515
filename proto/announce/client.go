package announce

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// Errors of a Client. A caller goes on without the tracker after either; only ErrUnavailable is worth another try.
var (
	ErrUnavailable = errors.New("tracker is not reachable now")
	ErrRefused     = errors.New("tracker refused the announce")
)

const (
	// MaxResponse bounds the answer to a batched announce in bytes: one metainfo of the largest size, in base64, fits.
	MaxResponse = 128 << 20
	// maxErrorBody bounds what is read of a refusal.
	maxErrorBody = 4 << 10
)

// Client sends batched announces to one tracker. It is safe for concurrent use.
type Client struct {
	url string
	hc  *http.Client
}

// NewClient takes the URL of a tracker, without /announce. A URL that can't be used shows at the first Announce.
func NewClient(base string, hc *http.Client) *Client {
	return &Client{url: strings.TrimSuffix(base, "/") + "/announce", hc: hc}
}

// Announce is POST /announce. It tries once: the next announce says it all again.
func (c *Client) Announce(ctx context.Context, r Request) (Response, error) {
	var out Response
	if err := r.Validate(); err != nil {
		return out, err
	}
	body, err := json.Marshal(r)
	if err != nil {
		return out, fmt.Errorf("announce: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, bytes.NewReader(body))
	if err != nil {
		return out, fmt.Errorf("announce: %w", err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.hc.Do(req)
	if err != nil {
		return out, fmt.Errorf("%w: announce %d blobs: %w", ErrUnavailable, len(r.Blobs), err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, rerr := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
		kind := ErrRefused
		if resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests || rerr != nil {
			kind = ErrUnavailable
		}
		return out, fmt.Errorf("%w: POST %s: %s: %s", kind, c.url, resp.Status, bytes.TrimSpace(text))
	}
	limited := &io.LimitedReader{R: resp.Body, N: MaxResponse}
	if err := json.NewDecoder(limited).Decode(&out); err != nil {
		return Response{}, fmt.Errorf("%w: POST %s: read the answer: %w", ErrUnavailable, c.url, err)
	}
	// To the end, so that the connection is used again; what fails here concerns only that.
	_, _ = io.Copy(io.Discard, limited)
	if out.Version > Version {
		return Response{}, fmt.Errorf("%w: answer has version %d, this is version %d", ErrVersion, out.Version, Version)
	}
	return out, nil
}
