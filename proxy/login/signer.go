package login

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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

	mu    sync.Mutex
	key   *access.SigningKey // nil until one is published
	until time.Time          // when key signs no more
	err   error
}

// keyMargin is how long before the end of a key the next one is made, as a share of its life.
const keyMargin = 10

// publishEvery is how often a key is published again that could not be.
const publishEvery = time.Second

// run makes keys until ctx ends.
func (s *signer) run(ctx context.Context) error {
	for {
		next := s.keyLife - s.keyLife/keyMargin
		if err := s.renew(ctx); err != nil {
			next = publishEvery
		}
		t := time.NewTimer(next)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
	}
}

// renew makes a key, publishes it, and signs with it from then on.
func (s *signer) renew(ctx context.Context) error {
	until := time.Now().Add(s.keyLife)
	k, err := access.NewSigningKey(until.Add(s.lifetime + time.Minute))
	if err == nil {
		err = s.publish(ctx, k.Public())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err = err; err != nil {
		if ctx.Err() == nil {
			s.log.Warn("a key for tokens was not published, the one before stays", "error", err)
		}
		return err
	}
	s.key, s.until = k, until
	s.log.Info("tokens are signed with a new key", "key", k.Public().ID)
	return nil
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

func (s *signer) state() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.key == nil && s.err == nil {
		return errNoKey
	}
	return s.err
}
