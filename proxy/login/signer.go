package login

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"kraken/proto/access"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// signer signs tokens with a key of this process, which it replaces in time. A key signs once build-index has its
// public half, from which all other proxies and the agents have it; there it stays until its last token has ended.
type signer struct {
	publish  func(context.Context, cluster.TokenKey) error
	keyLife  time.Duration
	lifetime time.Duration // of tokens
	service  string
	log      *slog.Logger

	began time.Time
	lost  chan struct{} // build-index does not have what was published; of one

	mu     sync.Mutex
	key    *access.SigningKey // nil until one is published
	before *access.SigningKey // the one in whose place it is; nil for none
	made   time.Time
	until  time.Time // when key signs no more: later than another should have taken its place
	err    error
	warned bool // of err
}

// A key is published for keyHold longer than its tokens live, and again each keyAgain while it signs: that of a proxy
// that is gone ends soon, however often proxies start. While build-index is away those who have heard of a key go on.
const (
	keyHold  = 10 * time.Minute
	keyAgain = 2 * time.Minute
)

// keyMargin is how long before the end of a key the next one is made, as a share of its life.
const keyMargin = 10

// publishEvery is how often a key is published again that could not be.
const publishEvery = time.Second

// run makes keys, and publishes them again, until ctx ends.
func (s *signer) run(ctx context.Context) error {
	for {
		next := publishEvery
		if err := s.keep(ctx); err == nil {
			next = min(keyAgain, s.left())
		}
		t := time.NewTimer(next)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-s.lost:
			t.Stop()
			s.tellBefore(ctx)
		case <-t.C:
		}
	}
}

// heard is told what keys build-index has. Where one is missing whose tokens are about, its database was lost, and run
// publishes it at once.
func (s *signer) heard(has []cluster.TokenKey) {
	s.mu.Lock()
	mine := []*access.SigningKey{s.key, s.lastSigned()}
	s.mu.Unlock()
	for _, k := range mine {
		if k != nil && !slices.ContainsFunc(has, func(o cluster.TokenKey) bool { return o.ID == k.ID() }) {
			select {
			case s.lost <- struct{}{}:
			default:
			}
			return
		}
	}
}

// lastSigned returns the key before, nil when no token of it can be about. The caller holds mu.
func (s *signer) lastSigned() *access.SigningKey {
	if time.Since(s.made) > s.lifetime {
		return nil
	}
	return s.before
}

// tellBefore publishes the key before once more, for the tokens that it has signed last.
func (s *signer) tellBefore(ctx context.Context) {
	s.mu.Lock()
	k := s.lastSigned()
	s.mu.Unlock()
	if k == nil {
		return
	}
	if err := s.put(ctx, k); err != nil {
		s.log.Info("the key of tokens before was not published again", "key", k.ID(), "error", err)
	}
}

// rotate is how old a key becomes before another takes its place.
func (s *signer) rotate() time.Duration { return s.keyLife - s.keyLife/keyMargin }

// left is how long until another key takes the place of the one that signs.
func (s *signer) left() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return max(0, s.rotate()-time.Since(s.made))
}

// keep publishes the key again, or another one in its place when it is too old.
func (s *signer) keep(ctx context.Context) error {
	s.mu.Lock()
	k, made := s.key, s.made
	s.mu.Unlock()
	if k == nil || time.Since(made) >= s.rotate() {
		return s.renew(ctx)
	}
	return s.told(ctx, s.put(ctx, k))
}

// put publishes a key, which is then good for all tokens that it signs before it has to be published again.
func (s *signer) put(ctx context.Context, k *access.SigningKey) error {
	return s.publish(ctx, k.Public(time.Now().Add(s.lifetime+keyHold)))
}

// renew makes a key, publishes it, and signs with it from then on. The one before is published once more: build-index
// may have been away for longer than it was good for there.
func (s *signer) renew(ctx context.Context) error {
	now := time.Now()
	k, err := access.NewSigningKey()
	if err == nil {
		err = s.put(ctx, k)
	}
	if err != nil {
		return s.told(ctx, err)
	}
	s.mu.Lock()
	s.key, s.before, s.made, s.until = k, s.key, now, now.Add(s.keyLife+keyHold)
	s.mu.Unlock()
	s.log.Info("tokens are signed with a new key", "key", k.ID())
	s.tellBefore(ctx)
	return s.told(ctx, nil)
}

// startPatience is how long after a start it is a matter of course that no key is published: build-index starts, too.
const startPatience = 30 * time.Second

// told notes how publishing went, and says a failure in the log when it is the first.
func (s *signer) told(ctx context.Context, err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	starting := s.key == nil && time.Since(s.began) < startPatience
	switch {
	case err == nil:
		s.warned = false
	case ctx.Err() != nil || s.warned:
	case starting && s.err == nil:
		s.log.Info("no key for tokens is published yet, it is tried again", "error", err)
	case !starting:
		s.log.Warn("a key for tokens was not published, it is tried again", "error", err)
		s.warned = true
	}
	s.err = err
	return err
}

var errNoKey = errors.New("no key for tokens is published yet")

// sign returns a token for the caller.
func (s *signer) sign(c access.Caller, by access.Shown) (token string, issued time.Time, err error) {
	s.mu.Lock()
	k, until := s.key, s.until
	s.mu.Unlock()
	now := time.Now()
	if k == nil || now.After(until) {
		return "", now, fmt.Errorf("%w: %w", registry.ErrUnavailable, errNoKey)
	}
	token, err = k.Sign(c, by, s.service, now, s.lifetime)
	return token, now, err
}

// ready returns nil once a key was published.
func (s *signer) ready() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.key == nil {
		return errNoKey
	}
	return nil
}

func (s *signer) state() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.key == nil && s.err == nil {
		return errNoKey
	}
	return s.err
}
