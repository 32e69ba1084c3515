package cluster

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"kraken/proto/transport"
)

const (
	// deadFor is how long an origin that could not be reached is asked last.
	deadFor = 2 * time.Second
	// probeEvery is how often an origin that was silent is asked whether it answers again, and how long for.
	probeEvery = 500 * time.Millisecond
)

// health is what requests told of one origin.
type health struct {
	deadUntil atomic.Int64 // nanoseconds of Unix time; it could not be reached
	silent    atomic.Bool  // it did not answer in time, and has not answered since
}

// observe is told of each request whether the origin was reached.
func (h *health) observe(reached bool) {
	if !reached {
		h.deadUntil.Store(time.Now().Add(deadFor).UnixNano())
		return
	}
	if h.deadUntil.Load() != 0 {
		h.deadUntil.Store(0)
	}
	if h.silent.Load() {
		h.silent.Store(false)
	}
}

// answers reports whether there is no reason to ask others first.
func (h *health) answers() bool {
	return !h.silent.Load() && h.deadUntil.Load() <= time.Now().UnixNano()
}

// Hangs asks the origin whether it answers, and reports whether it is silent for d. A refusal is an answer, also of the
// connection: what was sent before is answered, or cut off, by who listens no more. It is false when ctx ends first.
func (or *Origin) Hangs(ctx context.Context, d time.Duration) bool {
	asking, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	_, err := transport.AskAgain(asking, d, isSilence, func() (struct{}, error) {
		return struct{}{}, or.Ping(asking)
	})
	return isSilence(err) && ctx.Err() == nil
}

// isSilence reports whether an error is that nothing was answered, not even the attempt to connect.
func isSilence(err error) bool {
	var timeout net.Error
	return errors.Is(err, transport.ErrNoProgress) || errors.Is(err, context.DeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}

// prober asks origins that were silent until they answer, so that no request has to find that out.
type prober struct {
	ctx  context.Context
	stop context.CancelFunc
	wg   sync.WaitGroup
	mu   sync.Mutex // guards the begin of probes against the end of all
}

func newProber() *prober {
	p := &prober{}
	p.ctx, p.stop = context.WithCancel(context.Background())
	return p
}

// suspect asks for or until it answers. It may be called again and again.
func (p *prober) suspect(or *Origin) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx.Err() != nil || !or.health.silent.CompareAndSwap(false, true) {
		return
	}
	p.wg.Go(func() {
		t := time.NewTicker(probeEvery)
		defer t.Stop()
		for or.health.silent.Load() {
			select {
			case <-t.C:
				// The answer, any answer, ends the suspicion by itself.
				_ = or.Ping(transport.WithProgressTimeout(p.ctx, probeEvery))
			case <-p.ctx.Done():
				return
			}
		}
	})
}

// close ends all probes and waits for them.
func (p *prober) close() {
	p.mu.Lock()
	p.stop()
	p.mu.Unlock()
	p.wg.Wait()
}
