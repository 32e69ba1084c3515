package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"kraken/origin/store"
)

// A runtime waits for an agent that is silent, some versions without end, and goes on at once from one that has gone.
// So an agent that hangs ends itself, for whatever reason it hangs: the watchdog asks the agent's own listener as a
// runtime would, over a connection of its own each time.

// watchdogTries is how many questions in a row must be without an answer.
const watchdogTries = 3

// errHung is why a process ends that does not answer itself.
var errHung = errors.New("the agent does not answer on its own listener")

// watchdog watches one listener.
type watchdog struct {
	url    string
	client *http.Client
	after  time.Duration // without an answer for so long the process ends
	bark   func(error)   // ends it
}

// newWatchdog returns a watchdog of a listener on host:port. It does not care who the listener is to others, so that
// its certificate and its login are no matter.
func newWatchdog(listen string, secure bool, after time.Duration, bark func(error)) *watchdog {
	scheme, host := "http://", listen
	if secure {
		scheme = "https://"
	}
	if h, port, err := net.SplitHostPort(listen); err == nil {
		if ip := net.ParseIP(h); ip != nil && ip.IsUnspecified() {
			host = net.JoinHostPort("localhost", port)
		}
	}
	return &watchdog{url: scheme + host + "/health", after: after, bark: bark, client: &http.Client{
		Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: anyCertificate},
	}}
}

// run asks until ctx ends.
func (w *watchdog) run(ctx context.Context) error {
	each := w.after / watchdogTries
	failed := 0
	for {
		began := time.Now()
		err := w.ask(ctx, each)
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			failed = 0
		default:
			failed++
		}
		took := time.Since(began)
		if took > 2*each {
			failed = 0 // this process did not run, so that nothing is known of what it would have answered
		}
		if failed >= watchdogTries {
			w.bark(fmt.Errorf("%w for %s: %w", errHung, w.after, err))
			return nil
		}
		t := time.NewTimer(each - took)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
	}
}

// anyCertificate takes any: this process asks itself.
var anyCertificate = &tls.Config{InsecureSkipVerify: true} //nolint:gosec // nothing is told or believed

// ask returns nil for any answer, a refusal included, and an error for none in time and where nobody listens.
func (w *watchdog) ask(ctx context.Context, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, w.url, nil)
	if err != nil {
		return err
	}
	resp, err := w.client.Do(req)
	if err == nil {
		_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<16))
		resp.Body.Close()
	}
	var op *net.OpError
	if ctx.Err() != nil || errors.As(err, &op) && op.Op == "dial" {
		return err
	}
	return nil
}

// aliveEvery bounds how often being alive is looked at anew.
const aliveEvery = time.Second

// alive is whether the agent could serve a pull: what it needs for one is neither locked for ever nor waits for a disk
// that does not answer.
type alive struct {
	mu sync.Mutex // held while it is looked at: who asks meanwhile waits, too
	at time.Time
}

// aliveKey is the file of the cache that is written to see that it can be.
var aliveKey = resolutionKey("", "alive")

// health answers GET /health. It hangs where a pull would.
func (a *Agent) health(w http.ResponseWriter, r *http.Request) {
	a.alive.mu.Lock()
	if time.Since(a.alive.at) >= aliveEvery {
		a.mu.Lock()
		closing := a.closing
		a.mu.Unlock()
		if !closing {
			// A disk that refuses is no hang: pulls are relayed.
			if err := a.store.PutName(aliveKey, []byte(time.Now().UTC().Format(time.RFC3339))); err != nil && !errors.Is(err, store.ErrFull) {
				a.log.Warn("the cache can't be written to", "error", err)
			}
		}
		a.alive.at = time.Now()
	}
	a.alive.mu.Unlock()
	a.Health.Health(w, r)
}

// end ends a process that hangs: first its listeners, so that runtimes go on at once even where the kernel keeps the
// process because of a disk, then the process, with the stacks of all goroutines.
func (a *Agent) end(why error) {
	abort := func() {
		a.Abort()
		if a.hub != nil {
			_ = a.hub.Abort() // whatever does not close, the process ends
		}
	}
	if a.Deps.Die == nil {
		abort()
		a.log.Error("the agent hangs, and has closed its listeners", "error", why)
		return
	}
	a.Deps.Die(why, abort)
}
