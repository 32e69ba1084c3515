package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/transport"
)

// fronts serves err of each role's half as its server would, over a client that reached nobody, or somebody who failed.
type fronts struct {
	Blobs
	err error
}

func (f fronts) OpenBlob(context.Context, string, digest.Digest, Range) (*Content, error) {
	return nil, f.err
}

// TestAnswersNameNoAddress: what the roles' clients know of where they asked goes to the log, never to who asked them.
func TestAnswersNameNoAddress(t *testing.T) {
	d := digest.FromString("x")
	hc, err := transport.NewClient(transport.ClientConfig{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	failing := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusBadGateway) }))
	defer failing.Close()
	of := func(url string) *Client {
		c, err := NewClient(url, hc)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	_, unreachable := of(gone.URL).OpenBlob(t.Context(), "r", d, Whole)
	_, failed := of(failing.URL).OpenBlob(t.Context(), "r", d, Whole)
	nowhere := &RetryError{Err: fmt.Errorf("%w: blob %s: %w", ErrUnavailable, d, errors.Join(unreachable, failed)), After: time.Second}
	for name, tc := range map[string]struct {
		err  error
		want string
	}{
		"build-index is away": {unreachable, ErrUnavailable.Message + ": connection refused"},
		"an origin fails":     {failed, ErrUnavailable.Message + " (502 Bad Gateway)"},
		"no origin has it":    {fmt.Errorf("blob %s of r is a member, but no origin has it: %w", d, nowhere), "connection refused"},
		"copies":              {fmt.Errorf("%w: %w", ErrUnavailable, errors.Join(fmt.Errorf("start upload at origin-01: %w", unreachable), failed)), "start upload at origin-01"},
		"agent's reasons":     {&RetryError{Err: fmt.Errorf("%w: blob %s: origin origin-01 at %s: %v", ErrUnavailable, d, gone.URL, unreachable), After: time.Second}, "origin-01"},
		"unknown and away":    {fmt.Errorf("%w; and origins: %w", ErrBlobUnknown, unreachable), "connection refused"},
		"inside":              {fmt.Errorf("dial %s", gone.URL), ErrInternal.Message},
		"full":                {fmt.Errorf("%w: write /var/lib/kraken/x: %w", ErrStorageFull, unreachable), ErrStorageFull.Message},
	} {
		t.Run(name, func(t *testing.T) {
			var logged bytes.Buffer
			s := httptest.NewServer(Server{Blobs: fronts{err: tc.err}, Log: slog.New(slog.NewTextHandler(&logged, nil))}.Handler())
			defer s.Close()
			resp, err := http.Get(s.URL + "/v2/r/blobs/" + d.String())
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			b, err := io.ReadAll(resp.Body)
			var body errorBody
			if err = errors.Join(err, json.Unmarshal(b, &body)); err != nil || len(body.Errors) != 1 {
				t.Fatalf("%v in %q", err, b)
			}
			got := body.Errors[0].Message
			if regexp.MustCompile(`127\.0|http:|tcp`).MatchString(got) || !strings.Contains(got, tc.want) || strings.Count(got, ErrUnavailable.Message+": ") > 1 {
				t.Errorf("the client is told %q, want %q without addresses, once", got, tc.want)
			}
			if resp.StatusCode >= 500 && !strings.Contains(logged.String(), "127.0.0.1") {
				t.Errorf("the log says %q", logged.String())
			}
		})
	}
}
