package main

import (
	"context"
	"time"

	"kraken/test/netns"
)

// sampler records the traffic of all nodes until it is stopped.
type sampler struct {
	cancel context.CancelFunc
	done   chan struct{}
	at     []time.Duration
	seen   []netns.Traffic
	err    error
}

// sample begins to record; stop ends it.
func sample(n *netns.Network, every time.Duration) *sampler {
	ctx, cancel := context.WithCancel(context.Background())
	s := &sampler{cancel: cancel, done: make(chan struct{})}
	began := time.Now()
	go func() {
		defer close(s.done)
		t := time.NewTicker(every)
		defer t.Stop()
		for {
			seen, err := n.Traffic()
			if err != nil {
				s.err = err
				return
			}
			s.at, s.seen = append(s.at, time.Since(began)), append(s.seen, seen)
			select {
			case <-t.C:
			case <-ctx.Done():
				return
			}
		}
	}()
	return s
}

func (s *sampler) stop() error {
	s.cancel()
	<-s.done
	return s.err
}
