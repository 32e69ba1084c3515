package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// patient makes a request again while the other side restarts.
type patient struct {
	next     http.RoundTripper
	patience time.Duration
	since    atomic.Int64 // when the other side went away, in nanoseconds of Unix time; 0 while it answers
}

// Patient returns a client like hc for one other role, whose short absence fails no request: what the role refuses to
// connect for, or answers 503, is asked again, and what a broken connection may have reached it with where asking twice
// does no harm. It waits for patience from the moment the role went away, all requests together; a role that is away
// for longer fails each at once.
func Patient(hc *http.Client, patience time.Duration) *http.Client {
	out := *hc
	out.Transport = &patient{next: hc.Transport, patience: patience}
	return &out
}

var errAway = errors.New("it answers 503")

// RoundTrip implements http.RoundTripper.
func (p *patient) RoundTrip(req *http.Request) (*http.Response, error) {
	try := req
	var resp *http.Response
	ask := func() (struct{}, error) {
		if resp != nil { // of the try before
			resp.Body.Close()
			resp = nil
		}
		if try == nil {
			var err error
			if try, err = again(req); err != nil {
				return struct{}{}, backoff.Permanent(err)
			}
		}
		var err error
		resp, err = p.next.RoundTrip(try)
		try = nil
		switch {
		case err == nil && resp.StatusCode != http.StatusServiceUnavailable:
			p.since.Store(0)
			return struct{}{}, nil
		case err == nil:
			err = errAway
		case !mayRepeat(req, err):
			return struct{}{}, backoff.Permanent(err)
		}
		if p.since.CompareAndSwap(0, time.Now().UnixNano()) || p.left() > 0 {
			return struct{}{}, err
		}
		return struct{}{}, backoff.Permanent(err)
	}
	pauses := &backoff.ExponentialBackOff{InitialInterval: 20 * time.Millisecond, Multiplier: 1.5, RandomizationFactor: 0.3, MaxInterval: 300 * time.Millisecond}
	_, err := backoff.Retry(req.Context(), ask, backoff.WithBackOff(pauses), backoff.WithMaxElapsedTime(p.patience))
	if resp != nil {
		return resp, nil // also the last 503, which says why
	}
	return nil, err
}

// AskAgain asks until the answer is no error that passing takes for one that passes, or has done so for patience, with
// pauses that grow from 50 ms to a second: once where patience is 0. It returns the last answer, or why ctx has ended.
func AskAgain[T any](ctx context.Context, patience time.Duration, passing func(error) bool, ask func() (T, error)) (T, error) {
	if patience <= 0 {
		return ask()
	}
	pauses := &backoff.ExponentialBackOff{InitialInterval: 50 * time.Millisecond, Multiplier: 1.5, RandomizationFactor: 0.3, MaxInterval: time.Second}
	return backoff.Retry(ctx, func() (T, error) {
		v, err := ask()
		if err != nil && !passing(err) {
			err = backoff.Permanent(err)
		}
		return v, err
	}, backoff.WithBackOff(pauses), backoff.WithMaxElapsedTime(patience))
}

// left is how much of the patience is left.
func (p *patient) left() time.Duration {
	since := p.since.Load()
	return p.patience - time.Duration(time.Now().UnixNano()-since)
}

// again returns req with its body from the start.
func again(req *http.Request) (*http.Request, error) {
	out := req.Clone(req.Context())
	if req.Body == nil || req.Body == http.NoBody {
		return out, nil
	}
	body, err := req.GetBody()
	if err != nil {
		return nil, fmt.Errorf("read the request's body again: %w", err)
	}
	out.Body = body
	return out, nil
}

// mayRepeat reports whether a request that failed so may be made again: its body can be had again, and either no byte
// of it was sent, or it does the same when it is done twice and sets no conditions.
func mayRepeat(req *http.Request, err error) bool {
	if req.Body != nil && req.Body != http.NoBody && req.GetBody == nil || errors.Is(err, context.Canceled) {
		return false
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		return true
	}
	broken := errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
	switch req.Method {
	case http.MethodGet, http.MethodHead:
		return broken
	case http.MethodPut:
		return broken && req.Header.Get("If-Match") == "" && req.Header.Get("If-None-Match") == ""
	}
	return false
}
