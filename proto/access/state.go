package access

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// State is what the proxies share, as it was last heard of build-index: whose keys sign tokens, and which robots there
// are. While build-index is away the last answer stays, and keys stay until their end where it has lost them, and for a
// moment where they ended while it was away. It is safe for concurrent use.
type State struct {
	fetch func(ctx context.Context, have cluster.AccessState) (cluster.AccessState, error)
	every time.Duration
	log   *slog.Logger

	flight singleflight.Group

	mu     sync.Mutex
	keys   Keys
	robots map[string]cluster.Robot
	last   cluster.AccessState
	lost   map[string]bool // by id, the keys in last that build-index does not have
	begun  time.Time       // when the request of the last answer was sent; zero before the first
	asked  time.Time       // when the last request that has ended was sent
	err    error           // of that request
}

// refreshGap is the least time between two requests because of a key that is not known.
const refreshGap = 250 * time.Millisecond

// lostHold is for how long a key is kept at least that build-index does not have any more, from the first answer that
// lacks it: longer than a proxy needs to publish its key again, which may have ended there while build-index was away.
// What a key has signed ends by itself.
const lostHold = 30 * time.Second

const fetchTimeout = 5 * time.Second

// NewState returns a State that is asked for by fetch, again and again while Run runs. fetch is given its last answer,
// and may return it again.
func NewState(fetch func(ctx context.Context, have cluster.AccessState) (cluster.AccessState, error), every time.Duration, log *slog.Logger) *State {
	return &State{fetch: fetch, every: every, log: log, keys: Keys{}, robots: map[string]cluster.Robot{}, err: errors.New("not heard yet")}
}

// Run asks again and again until ctx ends.
func (s *State) Run(ctx context.Context) error {
	t := time.NewTicker(s.every)
	defer t.Stop()
	for {
		_ = s.refresh(ctx) // Err has it
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// Err returns why the last request failed, nil when it did not.
func (s *State) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return fmt.Errorf("keys and robots: %w", s.err)
	}
	return nil
}

// Heard reports whether build-index has answered, now or before.
func (s *State) Heard() bool { return !s.heard().IsZero() }

// refresh asks now. Those who want it at once share the request.
func (s *State) refresh(ctx context.Context) error {
	_, err, _ := s.flight.Do("", func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), fetchTimeout)
		defer cancel()
		begun := time.Now()
		s.mu.Lock()
		have := s.last
		s.mu.Unlock()
		got, err := s.fetch(ctx, have)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.asked = begun
		if s.err = err; err != nil {
			return nil, err
		}
		s.begun = begun
		if got.ETag != "" && got.ETag == have.ETag {
			return nil, nil // build-index leaves out what has ended
		}
		got.Keys = s.withKept(got.Keys, have.Keys, time.Now())
		keys, err := ParseKeys(got.Keys, time.Now())
		if err != nil {
			s.log.Warn("a key of tokens is not usable", "error", err)
		}
		s.keys, s.last = keys, got
		clear(s.robots)
		for _, r := range got.Robots {
			s.robots[r.Name] = r
		}
		return nil, nil
	})
	return err
}

// withKept returns the keys that build-index has, and those of the answer before that it lacks and that have not ended:
// none is taken back there before its end, so it has lost them, or was away at their end, and will be told of them
// again. They are no more than build-index keeps, the last to end. The caller holds mu.
func (s *State) withKept(has, before []cluster.TokenKey, now time.Time) []cluster.TokenKey {
	known := make(map[string]bool, len(has))
	for _, k := range has {
		known[k.ID] = true
	}
	var kept []cluster.TokenKey
	for _, k := range before {
		if known[k.ID] {
			continue
		}
		if hold := now.Add(lostHold); !s.lost[k.ID] && k.Expires.Before(hold) {
			k.Expires = hold // it is missed for the first time
		}
		if now.Before(k.Expires) {
			kept = append(kept, k)
		}
	}
	slices.SortFunc(kept, func(a, b cluster.TokenKey) int { return b.Expires.Compare(a.Expires) })
	kept = kept[:min(len(kept), max(0, cluster.MaxTokenKeys-len(has)))]
	s.lost = make(map[string]bool, len(kept))
	for _, k := range kept {
		s.lost[k.ID] = true
	}
	return slices.Concat(has, kept)
}

// refreshSince makes sure that an answer is of a request that was sent after t, and returns that request's error.
func (s *State) refreshSince(ctx context.Context, t time.Time) error {
	for {
		s.mu.Lock()
		begun, asked, err := s.begun, s.asked, s.err
		s.mu.Unlock()
		if begun.After(t) {
			return nil
		}
		if asked.After(t) {
			return err
		}
		if gap := refreshGap - time.Since(asked); gap > 0 {
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-time.After(gap):
			}
			continue // somebody else may have asked meanwhile
		}
		_ = s.refresh(ctx) // its error is seen in the next round
	}
}

// Parse returns what a token of this cluster says, ErrToken for one that shows nobody. A key that is not known yet is
// asked for; registry.ErrUnavailable where that can't be done.
func (s *State) Parse(ctx context.Context, raw, service string) (Claims, error) {
	now := time.Now()
	c, err := s.current().Parse(raw, service, now)
	if errors.Is(err, errUnknownKey) {
		if rerr := s.refreshSince(ctx, now); rerr != nil {
			return Claims{}, fmt.Errorf("%w: the key of a token is not known here, and can't be asked for: %w", registry.ErrUnavailable, rerr)
		}
		c, err = s.current().Parse(raw, service, now)
	}
	if err != nil {
		return Claims{}, err
	}
	if c.Via == ViaRobot && !s.holds(c) {
		// A robot of this name may have been made since. Whether the token is as new as that is asked of the clock only
		// so that old tokens make nobody ask; a question that fails leaves the answer as it is.
		if c.IssuedAt != nil && s.heard().Before(c.IssuedAt.Time().Add(leeway)) {
			_ = s.refreshSince(ctx, now)
		}
		if !s.holds(c) {
			return Claims{}, fmt.Errorf("%w: the robot was revoked", ErrToken)
		}
	}
	return c, nil
}

// holds reports whether a robot is the one that its token was given for.
func (s *State) holds(c Claims) bool {
	name, ok := strings.CutPrefix(c.Subject, RobotPrefix)
	r, live := s.robot(name)
	return ok && live && r.Generation == c.Proof
}

// heard returns when the request of the last answer was sent.
func (s *State) heard() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.begun
}

func (s *State) current() Keys {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.keys
}

// FindRobot returns the robot of a name if it fits, as its key may have to. Where none does, build-index is asked once
// more, since one may have been made a moment ago; registry.ErrUnavailable where it can't be.
func (s *State) FindRobot(ctx context.Context, name string, fits func(cluster.Robot) bool) (r cluster.Robot, ok bool, err error) {
	find := func() (cluster.Robot, bool) {
		r, live := s.robot(name)
		return r, live && fits(r)
	}
	if r, ok = find(); ok {
		return r, true, nil
	}
	if err := s.refreshSince(ctx, time.Now()); err != nil {
		return r, false, fmt.Errorf("%w: robot %q is not known here, and can't be asked for: %w", registry.ErrUnavailable, name, err)
	}
	r, ok = find()
	return r, ok, nil
}

// robot returns a robot that has not ended.
func (s *State) robot(name string) (cluster.Robot, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.robots[name]
	return r, ok && time.Now().Before(r.Expires)
}

// PublicKeys returns the keys of tokens that are known.
func (s *State) PublicKeys() []cluster.TokenKey {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last.Keys
}
