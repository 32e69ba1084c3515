package login

import (
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/bcrypt"

	"kraken/proto/access"
	"kraken/proto/audit"
	"kraken/proto/cluster"
)

// from asks for a token from an address.
func (r *rig) from(addr, authorization string) int {
	q := httptest.NewRequest("GET", "/token", nil)
	q.RemoteAddr = addr
	q.Header.Set("Authorization", authorization)
	w := httptest.NewRecorder()
	r.h.ServeHTTP(w, q)
	return w.Code
}

// audited returns how often the audit has a text.
func (r *rig) audited(text string) int {
	r.Helper()
	b, err := os.ReadFile(r.path("audit.jsonl"))
	if err != nil {
		r.Fatal(err)
	}
	return strings.Count(string(b), text)
}

// Who shows a robot's key or an ID token is let in however many others have failed as the same user, from anywhere; and
// those who fail with them hold up no user of a password behind the same address.
func TestWhatCantBeGuessedIsNotSlowed(t *testing.T) { synctest.Test(t, notSlowed) }

func notSlowed(t *testing.T) {
	r := newRig(t)
	robot, key := NewRobot("ci", "", time.Now(), time.Hour)
	r.index.state.Robots = []cluster.Robot{robot}
	r.heard()
	ended := r.idToken(map[string]any{"exp": time.Now().Add(-time.Hour).Unix()})
	codes := map[int]int{}
	for i := range 100 {
		for _, addr := range []string{fmt.Sprintf("[2001:db8:0:%x::1]:1", i), "10.0.0.1:1"} {
			for _, authorization := range []string{basic("robot+ci", "x"), basic("oidc", "x"), basic("oidc", ended), "Bearer " + ended} {
				codes[r.from(addr, authorization)]++
			}
		}
	}
	if codes[401]+codes[429] != 800 || codes[429] == 0 {
		t.Errorf("keys and tokens that are none are answered %v", codes)
	}
	if told := r.audited(audit.LoginFailed); told != codes[401] {
		t.Errorf("the audit has %d lines, of %d failures that were answered as such", told, codes[401])
	}
	for _, addr := range []string{"10.0.0.1:1", "10.9.9.9:1", "[2001:db8:0:1::1]:1"} {
		for who, authorization := range map[string]string{
			"a robot": basic("robot+ci", key), "CI": basic("oidc", r.idToken(nil)), "CI with a bearer": "Bearer " + r.idToken(nil), "ann": basic("ann", "ann-secret"),
		} {
			if code := r.from(addr, authorization); code != 200 {
				t.Errorf("%s from %s: %d", who, addr, code)
			}
		}
	}
}

// As many guesses are compared at once as one after the other; who asks with the right password many times at once is
// one who asks.
func TestThrottleInParallel(t *testing.T) {
	r := newRig(t)
	r.write("htpasswd", r.line("zoe", "zoe-secret"))
	var err error
	if r.door.passwords, err = openPasswords(r.path("htpasswd"), slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	atOnce := func(n int, password func(int) string) map[int]int {
		var wg sync.WaitGroup
		var mu sync.Mutex
		codes := map[int]int{}
		for i := range n {
			wg.Go(func() {
				c := r.from("10.9.9.9:1", basic("zoe", password(i)))
				mu.Lock()
				defer mu.Unlock()
				codes[c]++
			})
		}
		wg.Wait()
		return codes
	}
	if codes := atOnce(40, func(int) string { return "zoe-secret" }); codes[200] != 40 {
		t.Errorf("the right password, 40 times at once: %v", codes)
	}
	r.door.passwords.verified.Purge()
	if codes := atOnce(40, func(i int) string { return fmt.Sprint("guess", i) }); codes[401] != int(limitBoth.burst) {
		t.Errorf("40 guesses at once: %v", codes)
	}
}

// While an issuer can't be asked nobody knows whether its tokens are right: who shows one is told to come again, and
// has not failed.
func TestIssuerAway(t *testing.T) {
	r := newRig(t)
	away, err := access.OpenIssuers([]access.IssuerConfig{{Name: "k8s", Issuer: "https://k8s.test", Audience: "kraken", KeysURL: "http://127.0.0.1:1/keys"}}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	r.door.issuers = away
	for range 50 {
		for _, authorization := range []string{basic("oidc", r.idToken(nil)), "Bearer " + r.idToken(nil)} {
			if code := r.from("10.0.0.1:1", authorization); code != 503 {
				t.Fatalf("%d", code)
			}
			if w := r.do("GET", "/v2/team/a/manifests/x", authorization); w.Code != 503 || w.Header().Get("Retry-After") == "" {
				t.Fatalf("%d %s", w.Code, w.Body)
			}
		}
	}
	if n := r.audited(audit.LoginFailed); n != 0 {
		t.Errorf("the audit has %d failed logins", n)
	}
}

// A failure is forgotten when it is the oldest of too many, and not because there are others.
// Whether there is a robot of which nothing was heard yet is asked of build-index; while that is away nobody knows, and
// who shows a key has not failed.
func TestRobotThatIsNotKnownYet(t *testing.T) { synctest.Test(t, notKnownYet) }

func notKnownYet(t *testing.T) {
	r := newRig(t)
	robot, key := NewRobot("ci", "", time.Now(), time.Hour)
	again, newKey := NewRobot("ci", "", time.Now(), time.Hour)
	r.index.state.Robots = []cluster.Robot{robot}
	r.index.goes(true)
	if code := r.from("10.0.0.1:1", basic("robot+ci", key)); code != 503 {
		t.Errorf("before anything was heard, with build-index away: %d", code)
	}
	if n := r.audited(audit.LoginFailed); n != 0 {
		t.Errorf("the audit has %d failed logins", n)
	}
	r.index.goes(false)
	if code := r.from("10.0.0.1:1", basic("robot+ci", key)); code != 200 {
		t.Errorf("before anything was heard: %d", code)
	}
	r.index.mu.Lock()
	r.index.state.Robots = []cluster.Robot{again}
	r.index.mu.Unlock()
	if code := r.from("10.0.0.1:1", basic("robot+ci", newKey)); code != 200 {
		t.Errorf("with its new key: %d", code)
	}
	if code := r.from("10.0.0.1:1", basic("robot+ci", key)); code != 401 {
		t.Errorf("with its old key: %d", code)
	}
}

func TestThrottleForgetsTheOldest(t *testing.T) { synctest.Test(t, forgetsOldest) }

func forgetsOldest(t *testing.T) {
	th := newThrottle(6)
	for range 5 {
		if _, wait := th.take("a", "ann"); wait > 0 {
			t.Fatal("the first tries wait")
		}
	}
	for i := range 10 {
		if _, wait := th.take("a", "ann"); wait == 0 {
			t.Fatalf("another try after %d others failed is looked at", i)
		}
		th.take(fmt.Sprint("b", i), strings.Repeat("x", 1<<20))
	}
	if n := th.buckets.Len(); n > 6 {
		t.Errorf("%d buckets", n)
	}
	time.Sleep(limitBoth.every)
	back, wait := th.take("a", "ann")
	if wait > 0 {
		t.Errorf("after a while: %s", wait)
	}
	if _, wait := th.take("a", "ann"); wait == 0 {
		t.Error("a second one is looked at")
	}
	back()
	if _, wait := th.take("a", "ann"); wait > 0 {
		t.Error("what was given back can't be taken")
	}
}

// An address that may guess no more makes nobody's bucket forgotten, whatever users it makes up.
func TestRefusedGuessesForgetNobody(t *testing.T) { synctest.Test(t, forgetsNobody) }

func forgetsNobody(t *testing.T) {
	th := newThrottle(200)
	for range 5 {
		th.take("a", "ann")
	}
	for i := range 1000 {
		th.take("b", fmt.Sprint("nobody", i))
	}
	if _, wait := th.take("a", "ann"); wait == 0 {
		t.Error("the address guesses again")
	}
	n := th.buckets.Len()
	back, wait := th.take("c", "bob")
	if wait > 0 {
		t.Fatal("another address waits")
	}
	back()
	if left := th.buckets.Len(); left > n {
		t.Errorf("%d buckets are kept of which nothing is taken", left-n)
	}
}

// What stands where a user's name should is written when it is one, and else nobody reads it in the audit.
func TestAuditNamesNobodyUnknown(t *testing.T) {
	r := newRig(t)
	_, key := NewRobot("ci", "", time.Now(), time.Hour)
	for _, user := range []string{"ann", "robot+gone", "hunter2-pasted", key, "robot+" + key} {
		r.from("10.0.0.1:1", basic(user, "x"))
	}
	for text, want := range map[string]int{`"subject":"ann"`: 1, `"subject":"robot+gone"`: 1, "hunter2": 0, key: 0, `"subject":"unknown-`: 3} {
		if n := r.audited(text); n != want {
			t.Errorf("the audit has %d lines with %s, want %d", n, text, want)
		}
	}
}

// A wrong password costs what the dearest of the file does, whoever's it is.
func TestWrongPasswordsTakeAsLong(t *testing.T) {
	r := newRig(t)
	for _, c := range []struct{ of, highest int }{{4, 4}, {4, 10}, {9, 10}, {10, 10}, {12, 10}} {
		work := 1 << c.of
		for _, h := range r.door.passwords.padding(c.of, c.highest) {
			cost, err := bcrypt.Cost(h)
			if err != nil || bcrypt.CompareHashAndPassword(h, []byte("x")) == nil {
				t.Fatalf("padding %s: %v", h, err)
			}
			work += 1 << cost
		}
		if work != 1<<max(c.of, c.highest) {
			t.Errorf("a hash of cost %d in a file up to %d: work of %d", c.of, c.highest, work)
		}
	}
	all, err := parseHtpasswd("f", []byte(r.line("ann", "a")+"bob:$2y$11$"+strings.Repeat("a", 53)))
	if err != nil || all.highest != 11 {
		t.Errorf("highest %d, %v", all.highest, err)
	}
	if cost, err := bcrypt.Cost(r.door.passwords.nobody(11)); err != nil || cost != 11 {
		t.Errorf("who is not there has cost %d, %v", cost, err)
	}
}
