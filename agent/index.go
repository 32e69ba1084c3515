package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"sync/atomic"
	"time"

	"kraken/proto/registry"
	"kraken/proto/transport"
)

// Budgets of questions to build-index.
const (
	// probeEvery is how often a new connection is tried while an answer is waited for.
	probeEvery = time.Second
	// silentPatience is how long an answer is waited for after one did not come at all. What hangs costs its whole
	// patience once.
	silentPatience = time.Second
)

// Why an answer of build-index is not waited for any longer.
var (
	errNotConnected = errors.New("build-index can't be connected to")
	errSilent       = errors.New("build-index did not answer in time")
)

// indexHealth is this agent's view of whether build-index answers. Slow is not unreachable: while connections to it can
// be made, a question is waited for, because an older answer would be a wrong one.
type indexHealth struct {
	patience time.Duration // how long an answer is waited for
	address  string        // host and port
	dial     transport.DialFunc
	silent   atomic.Int64 // until when it counts as silent, in ns since the epoch
}

// newIndexHealth returns the view of the build-index at a URL, to which dial makes connections.
func newIndexHealth(base string, patience time.Duration, dial transport.DialFunc) (*indexHealth, error) {
	u, err := url.Parse(base)
	if err != nil {
		return nil, fmt.Errorf("build_index: %w", err)
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"https": "443"}[u.Scheme]
	}
	if port == "" {
		port = "80"
	}
	return &indexHealth{patience: patience, address: net.JoinHostPort(u.Hostname(), port), dial: dial}, nil
}

// ask calls a question with a context that ends when its answer is not to be waited for any longer: after the patience
// and up to a tenth more, so that the agents of a cluster don't give up at one moment, or as soon as a new connection
// can't be made. It returns the question's error, and nil or the reason why build-index counts as unreachable: it was
// not waited for any longer, or refused, broke off or answered 5xx or 429.
func (x *indexHealth) ask(ctx context.Context, question func(context.Context) error) (err, unreachable error) {
	wait := x.patience + rand.N(x.patience/10+1)
	if time.Now().UnixNano() < x.silent.Load() {
		wait = min(wait, silentPatience)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	limit := time.AfterFunc(wait, func() { cancel(errSilent) })
	probed := make(chan struct{})
	go func() {
		defer close(probed)
		x.probe(ctx, cancel)
	}()
	err = question(ctx)
	cause := context.Cause(ctx)
	limit.Stop()
	cancel(nil)
	<-probed
	switch {
	case err == nil:
		x.silent.Store(0)
		return nil, nil
	case errors.Is(cause, errSilent):
		x.silent.Store(time.Now().Add(x.patience).UnixNano())
		return fmt.Errorf("%w: %w: %w", registry.ErrUnavailable, errSilent, err), errSilent
	case errors.Is(cause, errNotConnected):
		return fmt.Errorf("%w: %w: %w", registry.ErrUnavailable, errNotConnected, err), errNotConnected
	case cause != nil, errors.Is(err, registry.ErrUnavailable), errors.Is(err, registry.ErrInternal), errors.Is(err, registry.ErrTooManyRequests):
		return err, errNotConnected
	}
	x.silent.Store(0)
	return err, nil
}

// probe connects to build-index again and again and cancels when that fails. A connection that was made before the
// network broke says nothing for minutes.
func (x *indexHealth) probe(ctx context.Context, cancel context.CancelCauseFunc) {
	t := time.NewTicker(probeEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		c, err := x.dial(ctx, "tcp", x.address)
		if err != nil {
			if ctx.Err() == nil {
				cancel(fmt.Errorf("%w: %w", errNotConnected, err))
			}
			return
		}
		c.Close() // it was only made to see that it can be
	}
}

// staleWarning returns the Warning header (RFC 7234, 110) of an answer that build-index did not confirm.
func staleWarning(reason error) string {
	if errors.Is(reason, errSilent) {
		return `110 kraken-agent "response is stale: build-index did not answer in time"`
	}
	return `110 kraken-agent "response is stale: build-index is unreachable"`
}
