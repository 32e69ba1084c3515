package login

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/crypto/bcrypt"
	"golang.org/x/sync/singleflight"

	"kraken/proto/access"
	"kraken/proto/registry"
)

const (
	// maxCost bounds the time of one comparison: 14 is about a second.
	maxCost = 14
	// verifiedFor is how long a pair that was verified is not compared again, maxVerified how many are remembered.
	verifiedFor = 10 * time.Minute
	maxVerified = 10_000
	// bcryptWait is how long a login waits for its turn, maxWaiting how many may wait.
	bcryptWait = 5 * time.Second
	maxWaiting = 64
)

// users is what a htpasswd file says.
type users struct {
	hashes  map[string][]byte // by name
	highest int               // cost of a hash
}

// parseHtpasswd reads lines of user:hash, where each hash is of bcrypt. Mistakes are told by line, without what it
// says.
func parseHtpasswd(name string, b []byte) (users, error) {
	out := users{hashes: map[string][]byte{}}
	n := 0
	for line := range bytes.Lines(b) {
		n++
		text := strings.TrimSpace(string(line))
		if text == "" || strings.HasPrefix(text, "#") {
			continue
		}
		user, hash, ok := strings.Cut(text, ":")
		if !ok {
			return users{}, fmt.Errorf("%s: line %d: want user:hash", name, n)
		}
		if err := access.CheckUser(user); err != nil {
			return users{}, fmt.Errorf("%s: line %d: %w", name, n, err)
		}
		cost, err := bcrypt.Cost([]byte(hash))
		if err != nil {
			return users{}, fmt.Errorf("%s: line %d: the hash of %s is not of bcrypt: make it with htpasswd -B", name, n, user)
		}
		if cost > maxCost {
			return users{}, fmt.Errorf("%s: line %d: the hash of %s has cost %d, at most %d", name, n, user, cost, maxCost)
		}
		if _, twice := out.hashes[user]; twice {
			return users{}, fmt.Errorf("%s: line %d: %s is there twice", name, n, user)
		}
		out.hashes[user], out.highest = []byte(hash), max(out.highest, cost)
	}
	return out, nil
}

// passwords verifies users' passwords. Comparisons take half of the processors at most, and a pair that was right is
// remembered for a while, by a hash with a key of this process.
type passwords struct {
	file     *access.File[users]
	key      []byte
	verified *lru.Cache[[sha256.Size]byte, time.Time] // when
	flight   singleflight.Group
	turns    chan struct{} // of comparisons that run
	waiting  chan struct{} // and of all
	decoy    string        // what stands after the cost in a hash that no password has
}

func openPasswords(file string, log *slog.Logger) (*passwords, error) {
	p := &passwords{
		key:   make([]byte, sha256.Size),
		turns: make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2)), waiting: make(chan struct{}, maxWaiting),
	}
	rand.Read(p.key) // never fails
	var err error
	if p.verified, err = lru.New[[sha256.Size]byte, time.Time](maxVerified); err != nil {
		return nil, err
	}
	h, err := bcrypt.GenerateFromPassword(p.key[:16], bcrypt.MinCost)
	if err != nil {
		return nil, err
	}
	p.decoy = string(h[len("$2a$04$"):])
	if file != "" {
		p.file, err = access.OpenFile(file, log, parseHtpasswd)
	}
	return p, err
}

// errPassword is a user that there is not, or another password.
var errPassword = errors.New("the user or the password is wrong")

// errThrottled is a login that is not looked at, because too many before it failed.
var errThrottled = fmt.Errorf("%w: too many logins failed", registry.ErrTooManyRequests)

func (p *passwords) users() users {
	if p.file == nil {
		return users{}
	}
	return p.file.Get()
}

// has reports whether there is such a user.
func (p *passwords) has(user string) bool {
	_, ok := p.users().hashes[user]
	return ok
}

// alias returns what a text is called where it is not to be read: the same while this process runs.
func (p *passwords) alias(text string) string {
	h := hmac.New(sha256.New, p.key)
	h.Write([]byte("alias\x00" + text)) // a hash never fails
	return hex.EncodeToString(h.Sum(nil)[:4])
}

// nobody returns a hash that no password has.
func (p *passwords) nobody(cost int) []byte { return fmt.Appendf(nil, "$2a$%02d$%s", cost, p.decoy) }

// padding returns hashes that take as long to compare with as one of the highest cost takes longer than one of this.
func (p *passwords) padding(cost, highest int) (out [][]byte) {
	for ; cost < highest; cost++ {
		out = append(out, p.nobody(cost)) // each step of cost is twice the work
	}
	return out
}

func (p *passwords) pair(user, password string, hash []byte) (sum [sha256.Size]byte) {
	h := hmac.New(sha256.New, p.key)
	fmt.Fprintf(h, "%d:%s%d:%s", len(user), user, len(hash), hash) // a hash never fails
	h.Write([]byte(password))
	return [sha256.Size]byte(h.Sum(nil))
}

// proof returns what tokens of a user have, at all proxies that have the same line of the file; when there is no such
// user, what none has.
func (p *passwords) proof(user string) string {
	hash, ok := p.users().hashes[user]
	if !ok {
		return "none"
	}
	return proofOf(user, hash)
}

// proofOf returns a fingerprint of a line of the file. It tells nothing of the password: bcrypt's salt, 128 random
// bits, is in the line alone.
func proofOf(user string, hash []byte) string {
	h := sha256.New()
	fmt.Fprintf(h, "kraken user %d:%s", len(user), user) // a hash never fails
	h.Write(hash)
	return base64.RawURLEncoding.EncodeToString(h.Sum(nil)[:12])
}

// remembered reports whether the pair was right lately, and still is, and returns the user's proof.
func (p *passwords) remembered(user, password string) (proof string, ok bool) {
	hash, ok := p.users().hashes[user]
	if !ok {
		return "", false
	}
	at, ok := p.verified.Get(p.pair(user, password, hash))
	return proofOf(user, hash), ok && time.Since(at) < verifiedFor
}

// verify returns the user's proof for the right password, errPassword for a wrong one, errThrottled when the source has
// to wait, and registry.ErrTooManyRequests when too many are being compared. A wrong one takes as long whoever's it is,
// also for a user that there is not. Those that come from a source at once with the same pair are one.
func (p *passwords) verify(t *throttle, source, user, password string) (proof string, err error) {
	users := p.users()
	hash, ok := users.hashes[user]
	highest := users.highest
	if highest == 0 {
		highest = bcrypt.DefaultCost
	}
	if !ok {
		hash = p.nobody(highest)
	}
	pair := p.pair(user, password, hash)
	_, err, _ = p.flight.Do(string(pair[:])+source, func() (any, error) {
		back, wait := t.take(source, user)
		if wait > 0 {
			return nil, &registry.RetryError{Err: errThrottled, After: wait}
		}
		err := p.compare(hash, highest, password)
		if err == nil && !ok {
			err = errPassword
		}
		if err == nil {
			p.verified.Add(pair, time.Now())
		}
		if !errors.Is(err, errPassword) {
			back()
		}
		return nil, err
	})
	return proofOf(user, hash), err
}

func (p *passwords) compare(hash []byte, highest int, password string) error {
	busy := &registry.RetryError{Err: fmt.Errorf("%w: too many logins at once", registry.ErrTooManyRequests), After: bcryptWait}
	select {
	case p.waiting <- struct{}{}:
		defer func() { <-p.waiting }()
	default:
		return busy
	}
	t := time.NewTimer(bcryptWait)
	defer t.Stop()
	select {
	case p.turns <- struct{}{}:
		defer func() { <-p.turns }()
	case <-t.C:
		return busy
	}
	if bcrypt.CompareHashAndPassword(hash, []byte(password)) == nil {
		return nil
	}
	if cost, err := bcrypt.Cost(hash); err == nil {
		for _, h := range p.padding(cost, highest) {
			_ = bcrypt.CompareHashAndPassword(h, []byte(password)) // for the time that it takes
		}
	}
	return errPassword
}
