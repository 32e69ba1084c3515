package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// patient makes a request again while the other side restarts.
type patient struct {
	next     http.RoundTripper
	patience time.Duration
	isAway   func(*http.Response) bool
	absence  absence
}

// Patient returns a client like hc for one other role, whose short absence fails no request: what the role refuses to
// connect for, or gives an answer to that isAway takes for its absence, is asked again, and what a broken connection
// may have reached it with where asking twice does no harm. It waits for patience from the moment the role went away,
// all requests together, and between two tries for as long as an answer says (Retry-After); a role that is away for
// longer fails each at once. Answers that isAway does not take for an absence are the caller's.
func Patient(hc *http.Client, patience time.Duration, isAway func(*http.Response) bool) *http.Client {
	out := *hc
	out.Transport = &patient{next: hc.Transport, patience: patience, isAway: isAway}
	return &out
}

// absence is since when the other side is away.
type absence struct {
	mu          sync.Mutex
	since, last time.Time // when it was found away first, and last; zero while it answers
}

// found notes that the other side is away, and returns since when. What was heard longer ago than patience says nothing
// of the time since: it may have answered to nobody's question, and gone away once more.
func (a *absence) found(patience time.Duration) (since time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	if a.since.IsZero() || now.Sub(a.last) > patience {
		a.since = now
	}
	a.last = now
	return a.since
}

// over notes that the other side has answered.
func (a *absence) over() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.since = time.Time{}
}

// RoundTrip implements http.RoundTripper.
func (p *patient) RoundTrip(req *http.Request) (*http.Response, error) {
	pauses := &backoff.ExponentialBackOff{InitialInterval: 20 * time.Millisecond, Multiplier: 1.5, RandomizationFactor: 0.3, MaxInterval: 300 * time.Millisecond}
	pauses.Reset()
	var missed time.Time // by this request, for the first time
	for try := req; ; {
		resp, err := p.next.RoundTrip(try)
		switch {
		case err == nil && !p.isAway(resp):
			p.absence.over()
			return resp, nil
		case err != nil && !mayRepeat(req, err):
			return nil, err
		}
		since := p.absence.found(p.patience)
		if missed.IsZero() {
			missed = time.Now()
		}
		if missed.Before(since) { // others were answered meanwhile
			since = missed
		}
		pause, ok := p.pause(resp, time.Until(since.Add(p.patience)), pauses.NextBackOff())
		if !ok || !bodyAgain(req) {
			return resp, err // also the last answer, which says why
		}
		if try, err = again(req); err != nil {
			return nil, errors.Join(err, closeBody(resp))
		}
		if err := errors.Join(closeBody(resp), wait(req.Context(), pause)); err != nil {
			return nil, err
		}
	}
}

// pause returns how long to wait before the next try, at least as long as the last answer says, and false when there is
// no patience left for one.
func (p *patient) pause(resp *http.Response, left, next time.Duration) (time.Duration, bool) {
	next = min(next, left)
	if resp != nil {
		if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s >= 0 {
			next = max(next, time.Duration(min(s, 1<<30))*time.Second)
		}
	}
	return next, left > 0 && next <= p.patience
}

func closeBody(resp *http.Response) error {
	if resp == nil {
		return nil
	}
	return resp.Body.Close()
}

// wait returns after d, or with why ctx has ended.
func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
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

// bodyAgain reports whether the request's body can be had again.
func bodyAgain(req *http.Request) bool {
	return req.Body == nil || req.Body == http.NoBody || req.GetBody != nil
}

// mayRepeat reports whether a request that failed so may be made again: its body can be had again, and either no byte
// of it was sent, or it does the same when it is done twice and sets no conditions.
func mayRepeat(req *http.Request, err error) bool {
	if !bodyAgain(req) || errors.Is(err, context.Canceled) {
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
