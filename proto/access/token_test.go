package access

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kraken/proto/cluster"
	"kraken/proto/registry"
)

func keyOf(t testing.TB) *SigningKey {
	t.Helper()
	k, err := NewSigningKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// A token is taken for its service, while it lasts, from a key that is known; anything else shows nobody.
func TestTokens(t *testing.T) {
	k, other := keyOf(t), keyOf(t)
	now := time.Now()
	ann := Caller{Subject: "ann", Groups: []string{"x:g"}, Scopes: []Scope{{TypeRepository, "a", []string{"pull"}}}}
	token, err := k.Sign(ann, Shown{Via: ViaPassword}, "kraken", now, 5*time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := ParseKeys([]cluster.TokenKey{k.Public(time.Now().Add(time.Hour))}, now)
	if err != nil {
		t.Fatal(err)
	}
	c, err := keys.Parse(token, "kraken", now.Add(4*time.Minute))
	if err != nil || c.Caller().Subject != "ann" || c.Via != ViaPassword || len(c.Caller().Scopes) != 1 || c.Groups[0] != "x:g" {
		t.Errorf("%+v, %v", c, err)
	}
	foreign, err := other.Sign(ann, Shown{}, "kraken", now, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(token, ".")
	for name, bad := range map[string]struct {
		raw, service string
		at           time.Time
	}{
		"another service": {token, "other", now},
		"later":           {token, "kraken", now.Add(6 * time.Minute)},
		"before":          {token, "kraken", now.Add(-time.Minute)},
		"another key":     {foreign, "kraken", now},
		"no signature":    {parts[0] + "." + parts[1] + ".", "kraken", now},
		"other claims":    {parts[0] + "." + strings.Split(foreign, ".")[1] + "." + parts[2], "kraken", now},
		"no algorithm":    {"eyJhbGciOiJub25lIn0." + parts[1] + ".", "kraken", now},
		"nothing":         {"", "kraken", now},
		"long":            {strings.Repeat("a", maxToken+1), "kraken", now},
	} {
		if c, err := keys.Parse(bad.raw, bad.service, bad.at); !errors.Is(err, ErrToken) || c.Subject != "" {
			t.Errorf("%s: %+v, %v", name, c, err)
		}
	}
	if got, _ := ParseKeys([]cluster.TokenKey{k.Public(time.Now().Add(time.Hour))}, now.Add(2*time.Hour)); len(got) != 0 {
		t.Error("a key outlives its end")
	}
}

// A key is never published with its private half.
func TestPublicKeyIsPublic(t *testing.T) {
	var k map[string]any
	if err := json.Unmarshal(keyOf(t).Public(time.Now().Add(time.Hour)).JWK, &k); err != nil || k["d"] != nil || k["x"] == nil {
		t.Errorf("%v, %v", k, err)
	}
}

// shared is what a build-index has, for a State to ask for.
type shared struct {
	state cluster.AccessState
	err   error
	asked int
}

func (s *shared) fetch(context.Context, cluster.AccessState) (cluster.AccessState, error) {
	s.asked++
	return s.state, s.err
}

// A key that was published after the last question is asked for at once; the last answer holds while build-index is
// away; a robot that was revoked takes its tokens with it.
func TestStateHearsOfKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		index := &shared{}
		s := NewState(index.fetch, time.Minute, slog.New(slog.DiscardHandler))
		ctx := t.Context()
		k := keyOf(t)
		robot := Caller{Subject: "robot+ci", Scopes: []Scope{}}
		index.state = cluster.AccessState{Keys: []cluster.TokenKey{k.Public(time.Now().Add(time.Hour))}, Robots: []cluster.Robot{{Name: "ci", Generation: "one", Expires: time.Now().Add(time.Hour)}}}
		token, err := k.Sign(robot, Shown{ViaRobot, "one"}, "kraken", time.Now(), 10*time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
		if _, err := s.Parse(ctx, token, "kraken"); err != nil {
			t.Errorf("a new key: %v", err)
		}
		index.err = errors.New("away")
		if _, err := s.Parse(ctx, token, "kraken"); err != nil {
			t.Errorf("while build-index is away: %v", err)
		}
		unknown, err := keyOf(t).Sign(robot, Shown{ViaRobot, "one"}, "kraken", time.Now(), time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Parse(ctx, unknown, "kraken"); !errors.Is(err, registry.ErrUnavailable) {
			t.Errorf("a key that can't be asked for: %v", err)
		}
		index.err, index.state.Robots = nil, nil
		if _, err := s.Parse(ctx, unknown, "kraken"); !errors.Is(err, ErrToken) {
			t.Errorf("a key that nobody has: %v", err)
		}
		if _, err := s.Parse(ctx, token, "kraken"); !errors.Is(err, ErrToken) {
			t.Errorf("a robot that was revoked: %v", err)
		}
		before := index.asked
		for range 3 {
			_, _ = s.Parse(ctx, unknown, "kraken")
		}
		if n := index.asked - before; n > 4 {
			t.Errorf("%d questions for three tokens", n)
		}
	})
}

// A build-index that has lost its database takes no key from those who have heard of it: tokens stay good, as long as
// the key was to be good, and what is not known any more is not kept.
func TestKeysOutliveTheDatabase(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		index := &shared{}
		s := NewState(index.fetch, time.Minute, slog.New(slog.DiscardHandler))
		k, later := keyOf(t), keyOf(t)
		index.state = cluster.AccessState{ETag: "1", Keys: []cluster.TokenKey{k.Public(time.Now().Add(time.Hour))}}
		token, err := k.Sign(Caller{Subject: "ann", Scopes: []Scope{}}, Shown{ViaPassword, ""}, "kraken", time.Now(), 2*time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		for i, keys := range [][]cluster.TokenKey{index.state.Keys, nil, {later.Public(time.Now().Add(3 * time.Hour))}} {
			index.state = cluster.AccessState{ETag: fmt.Sprint(i), Keys: keys}
			if err := s.refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Parse(t.Context(), token, "kraken"); err != nil {
				t.Errorf("when build-index has the keys %v: %v", keys, err)
			}
		}
		if n := len(s.PublicKeys()); n != 2 {
			t.Errorf("%d keys are published", n)
		}
		time.Sleep(time.Hour + time.Minute)
		index.state.ETag = "end"
		if err := s.refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Parse(t.Context(), token, "kraken"); !errors.Is(err, ErrToken) || len(s.PublicKeys()) != 1 {
			t.Errorf("a key that has ended: %v, %d keys", err, len(s.PublicKeys()))
		}
		for i := range 3 {
			many := make([]cluster.TokenKey, cluster.MaxTokenKeys)
			for j := range many {
				many[j] = cluster.TokenKey{ID: fmt.Sprint(i, j), Expires: time.Now().Add(time.Hour)}
			}
			index.state = cluster.AccessState{ETag: fmt.Sprint("many", i), Keys: many}
			if err := s.refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if n := len(s.PublicKeys()); n > cluster.MaxTokenKeys {
			t.Errorf("%d keys are kept", n)
		}
	})
}

// A build-index that was away for longer than keys are published for knows none when it is back, until each proxy has
// published its own again: what these have signed meanwhile is good until then. A key that nobody publishes ends.
func TestKeysOutliveALongOutage(t *testing.T) {
	for name, again := range map[string]bool{"published again": true, "of a proxy that is gone": false} {
		synctest.Test(t, func(t *testing.T) {
			index := &shared{}
			s := NewState(index.fetch, time.Minute, slog.New(slog.DiscardHandler))
			k := keyOf(t)
			index.state = cluster.AccessState{ETag: "before", Keys: []cluster.TokenKey{k.Public(time.Now().Add(20 * time.Minute))}}
			if err := s.refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
			index.err = errors.New("away")
			time.Sleep(time.Hour)
			token, err := k.Sign(Caller{Subject: "ann", Scopes: []Scope{}}, Shown{ViaPassword, ""}, "kraken", time.Now(), 10*time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			look := func(when string, good bool) {
				t.Helper()
				if err := s.refresh(t.Context()); (err == nil) != (index.err == nil) {
					t.Fatal(err)
				}
				if _, err := s.Parse(t.Context(), token, "kraken"); (err == nil) != good || !good && !errors.Is(err, ErrToken) {
					t.Errorf("%s, %s: %v", name, when, err)
				}
			}
			look("while build-index is away", true)
			index.err, index.state = nil, cluster.AccessState{ETag: "back"}
			look("when it is back", true)
			for range 10 { // as others change
				time.Sleep(500 * time.Millisecond)
				index.state.ETag += "."
				look("in the seconds after", true)
			}
			if again {
				index.state.Keys = []cluster.TokenKey{k.Public(time.Now().Add(20 * time.Minute))}
			}
			index.state.ETag = "later"
			time.Sleep(lostHold)
			look("later", again)
			if n := len(s.PublicKeys()); n != len(index.state.Keys) {
				t.Errorf("%s: %d keys are published", name, n)
			}
		})
	}
}

// A token of a robot is good for the robot that it was given for, whatever clocks say: one of the same name that was
// made since is another, and is heard of at once.
func TestRobotsGenerations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		index := &shared{}
		s := NewState(index.fetch, time.Minute, slog.New(slog.DiscardHandler))
		k := keyOf(t)
		put := func(generation string) {
			// made on a machine whose clock is wrong
			index.state = cluster.AccessState{Keys: []cluster.TokenKey{k.Public(time.Now().Add(time.Hour))}, Robots: []cluster.Robot{{Name: "ci", Generation: generation, Created: time.Now().Add(10 * time.Minute), Expires: time.Now().Add(time.Hour)}}}
		}
		token := func(generation string) string {
			raw, err := k.Sign(Caller{Subject: "robot+ci", Scopes: []Scope{}}, Shown{ViaRobot, generation}, "kraken", time.Now(), 10*time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			return raw
		}
		put("one")
		one := token("one")
		if _, err := s.Parse(t.Context(), one, "kraken"); err != nil {
			t.Errorf("the robot's token: %v", err)
		}
		put("two")
		if _, err := s.Parse(t.Context(), token("two"), "kraken"); err != nil {
			t.Errorf("the token of a robot that was put again, and not heard of: %v", err)
		}
		for _, raw := range []string{one, token(""), token("three")} {
			if _, err := s.Parse(t.Context(), raw, "kraken"); !errors.Is(err, ErrToken) {
				t.Errorf("the token of another generation: %v", err)
			}
		}
		time.Sleep(5 * time.Minute)
		if err := s.refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		before := index.asked
		for range 10 {
			_, _ = s.Parse(t.Context(), one, "kraken")
		}
		if index.asked != before {
			t.Errorf("an old token makes build-index be asked %d times", index.asked-before)
		}
	})
}

func FuzzToken(f *testing.F) {
	k := keyOf(f)
	token, err := k.Sign(Caller{Subject: "ann"}, Shown{}, "kraken", time.Now(), time.Minute)
	if err != nil {
		f.Fatal(err)
	}
	keys, err := ParseKeys([]cluster.TokenKey{k.Public(time.Now().Add(time.Hour))}, time.Now())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(token)
	f.Add("a.b.c")
	f.Fuzz(func(t *testing.T, raw string) {
		c, err := keys.Parse(raw, "kraken", time.Now())
		if err == nil && c.Subject != "ann" {
			t.Errorf("%q shows %q", raw, c.Subject)
		}
		_ = issuerOf(raw)
	})
}

func FuzzScopes(f *testing.F) {
	f.Add("repository:a/b:pull,push registry:catalog:* repository(plugin):x:pull")
	f.Fuzz(func(t *testing.T, s string) {
		for _, sc := range ParseScopes([]string{s}) {
			if again := ParseScopes([]string{sc.String()}); len(again) != 1 || again[0].String() != sc.String() {
				t.Errorf("%q is read as %v, and that as %v", s, sc, again)
			}
		}
	})
}
