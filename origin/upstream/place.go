package upstream

import (
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"sync"
	"time"

	"kraken/proto/registry"
)

// place is one endpoint of a registry.
type place struct {
	url    *url.URL // scheme and host
	prefix string   // before repositories there
	login  *login
	client *registry.Client

	mu     sync.Mutex
	paused map[pause]time.Time // until when requests are not sent
	fails  int                 // in a row without an answer
}

// kind is what is asked for. An upstream that has enough of one may go on with others: Docker Hub counts manifests
// alone.
type kind string

const (
	kindHead      kind = "head"
	kindManifest  kind = "manifest"
	kindReferrers kind = "referrers"
	kindTags      kind = "tags"
	kindStat      kind = "stat"
	kindBlob      kind = "blob"
	kindAll       kind = ""
)

// pause is which requests are not sent: of a kind, or of all, by who has had enough, or everybody. A registry counts
// those of one account, or of this address for nobody's.
type pause struct {
	kind kind
	who  string // Registry.Reader, empty for everybody
}

// maxPauses bounds those that are remembered.
const maxPauses = 1024

// mayAsk returns ErrUnavailable while requests of a kind by who are not sent.
func (p *place) mayAsk(k kind, who string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var until time.Time
	for _, is := range []pause{{k, who}, {kindAll, who}, {k, ""}, {kindAll, ""}} {
		if at := p.paused[is]; at.After(until) {
			until = at
		}
	}
	if left := time.Until(until); left > 0 {
		return &registry.RetryError{Err: fmt.Errorf("%w: it is left alone for %s more", registry.ErrUnavailable, left.Round(time.Second)), After: left}
	}
	return nil
}

// trouble says what is wrong with the place now, empty for nothing.
func (p *place) trouble() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch now := time.Now(); {
	case p.fails > 0:
		return "does not answer"
	case slices.ContainsFunc(slices.Collect(maps.Values(p.paused)), now.Before):
		return "refuses more requests"
	}
	return ""
}

// Pauses after an upstream that did not answer, doubled each time.
const (
	firstPause  = time.Second
	longPause   = 30 * time.Second
	busyPause   = 5 * time.Second // after 429 without Retry-After
	brokenAfter = time.Second     // when to ask again after an answer of 5xx
)

// note remembers what an answer says of the place, and returns the error as this package's. What did not answer in the
// time that it took is left alone for as long, so that an upstream that hangs costs that time once, and not for each of
// the blobs of an image.
func (p *place) note(k kind, who string, err error, took time.Duration) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	rest := func(what pause, after time.Duration) error {
		after = min(after, maxPause)
		if p.paused == nil || len(p.paused) >= maxPauses {
			p.paused = map[pause]time.Time{}
		}
		p.paused[what] = time.Now().Add(after)
		return &registry.RetryError{Err: fmt.Errorf("%w: %w", registry.ErrUnavailable, err), After: after}
	}
	var retry *registry.RetryError
	var realm *realmError
	var waited time.Duration
	if errors.Is(err, errSilent) {
		waited = min(took, longPause)
	}
	after := func(otherwise time.Duration) time.Duration {
		switch {
		case errors.As(err, &retry):
			return retry.After
		case errors.As(err, &realm) && realm.after > 0:
			return realm.after
		}
		return otherwise
	}
	switch {
	case err == nil, errors.Is(err, registry.ErrManifestUnknown), errors.Is(err, registry.ErrBlobUnknown), errors.Is(err, registry.ErrUnauthorized), errors.Is(err, registry.ErrDenied):
		p.fails = 0
		return err
	case errors.Is(err, registry.ErrNameUnknown):
		p.fails = 0
		if k == kindBlob || k == kindStat {
			return fmt.Errorf("%w: %w", registry.ErrBlobUnknown, err)
		}
		return fmt.Errorf("%w: %w", registry.ErrManifestUnknown, err)
	case errors.Is(err, registry.ErrTooManyRequests):
		p.fails = 0
		wait := after(busyPause)
		err = errors.New("it refuses more requests now") // and never 429, whose retries runtimes don't space
		return rest(pause{k, who}, wait)
	case errors.As(err, &realm):
		return rest(pause{kindAll, who}, max(after(busyPause), waited))
	case answered(err), errors.Is(err, ErrForbiddenAddress):
		p.fails = 0
		if wait := after(0); wait > 0 {
			return rest(pause{k, who}, wait)
		}
		// About one name, perhaps: others are asked for.
		return &registry.RetryError{Err: fmt.Errorf("%w: %w", registry.ErrUnavailable, err), After: brokenAfter}
	}
	p.fails++
	if k != kindBlob && k != kindStat {
		k = kindAll
	} // else it may be the host that blobs are at
	return rest(pause{k, ""}, max(min(firstPause<<min(p.fails-1, 5), longPause), waited))
}

// answered reports whether err is an upstream's answer rather than that there was none.
func answered(err error) bool {
	var ue *url.Error
	if errors.Is(err, errSilent) {
		return false
	}
	if !errors.As(err, &ue) {
		return true
	}
	var kind *registry.Error
	return errors.As(ue.Err, &kind)
}

// forgive ends all pauses.
func (p *place) forgive() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.paused, p.fails = nil, 0
}
