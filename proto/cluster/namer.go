package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

	"kraken/proto/registry"
)

// Namer says which repository of the cluster a client means (registry.Namer): the cluster's own for one of its own
// names and without one, an upstream's for the upstream's name, be it in ?ns= or first in the path. So an own
// repository is never taken for an upstream's, whatever it is called. It is safe for concurrent use.
type Namer struct {
	own       []string                  // canonical
	upstreams atomic.Pointer[Upstreams] // nil: not known
}

// NewNamer returns a Namer of a cluster with these names of its own. It knows of no upstream before it is told.
func NewNamer(own []string) *Namer {
	n := &Namer{}
	for _, name := range own {
		n.own = append(n.own, CanonicalRegistry(name))
	}
	return n
}

// Upstreams returns what the cluster mirrors, as far as is known: nothing before Known.
func (n *Namer) Upstreams() Upstreams {
	if u := n.upstreams.Load(); u != nil {
		return *u
	}
	return Upstreams{}
}

// Known reports whether it was ever told what the cluster mirrors. Until then nobody knows what is private.
func (n *Namer) Known() bool { return n.upstreams.Load() != nil }

// MayBePrivate reports whether only its upstream can say who may read a repository: one of ModeCaller, and before Known
// any that may be an upstream's.
func (n *Namer) MayBePrivate(repository string) bool {
	if u := n.upstreams.Load(); u != nil {
		return u.ModeOf(repository) == ModeCaller
	}
	_, _, ok := SplitUpstream(repository)
	return ok
}

// Set says what the cluster mirrors from now on.
func (n *Namer) Set(u Upstreams) { n.upstreams.Store(&u) }

// Repository implements registry.Namer.
func (n *Namer) Repository(namespace, path string) (string, error) {
	host := CanonicalRegistry(namespace)
	if host != "" && !slices.Contains(n.own, host) {
		return n.upstream(host, path)
	}
	host, rest, ok := SplitUpstream(path)
	switch {
	case !ok:
		return path, nil
	case slices.Contains(n.own, host):
		return n.Repository("", rest)
	case !n.Upstreams().Any():
		return path, nil
	}
	return n.upstream(host, rest)
}

// upstream returns the repository of a registry, which is an upstream if anything.
func (n *Namer) upstream(host, repository string) (string, error) {
	switch u := n.Upstreams(); {
	case !u.Mirrors(host):
		return "", fmt.Errorf("%w: this is no mirror of %.100q", registry.ErrNameUnknown, host)
	case repository == "":
		return host, nil
	}
	return JoinUpstream(host, repository)
}

// CheckPush returns ErrUnsupported for an upstream's repository that is not pushed to: its names are the upstream's.
func (n *Namer) CheckPush(repository string) error {
	host, _, ok := SplitUpstream(repository)
	if !ok || !n.Upstreams().Any() {
		return nil
	}
	if up, mirrored := n.Upstreams().Match(host); mirrored && up.Import {
		return nil
	}
	return fmt.Errorf("%w: %s is another registry's repository: what is there is read from that registry, and pushed here only if its upstream is marked import",
		registry.ErrUnsupported, repository)
}

// StandsFor returns a Namer of a listener that stands for one registry: a name without a registry's is that registry's.
func (n *Namer) StandsFor(host string) registry.Namer { return standIn{n, CanonicalRegistry(host)} }

type standIn struct {
	n    *Namer
	host string
}

// Repository implements registry.Namer.
func (s standIn) Repository(namespace, path string) (string, error) {
	if namespace != "" && CanonicalRegistry(namespace) != s.host {
		return "", fmt.Errorf("%w: this listener stands for %s, not for %.100q", registry.ErrNameUnknown, s.host, namespace)
	}
	return s.n.upstream(s.host, path)
}

// Times between two questions about upstreams: the usual one, and the first after one that failed.
const (
	watchEvery = 30 * time.Second
	watchSoon  = time.Second
)

// Watch asks a build-index what the cluster mirrors, at once and then every 30 s, until ctx ends, and sets it. known is
// what it has said last in another life, empty for nothing; keep, which may be nil, is called with each new answer, and
// again with the next question while it fails.
func (n *Namer) Watch(ctx context.Context, index *IndexClient, log *slog.Logger, known []byte, keep func([]byte) error) error {
	var u Upstreams
	if json.Unmarshal(known, &u) == nil {
		n.Set(u)
	}
	kept := keeper{last: known, keep: keep, log: log}
	wait, failing := watchSoon, false
	for {
		u, err := index.upstreams(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			if !failing {
				log.Info("which registries are mirrored is not known anew: build-index does not say", "error", err)
			}
			failing, wait = true, min(2*wait, watchEvery)
			if !n.Known() { // it is a mirror of nothing until then
				wait = watchSoon
			}
		default:
			failing, wait = false, watchEvery
			n.Set(u)
			kept.heard(u)
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
		if !failing {
			wait = watchSoon
		}
	}
}

// keeper keeps what build-index says for the next start.
type keeper struct {
	last    []byte             // what is kept; nil where that is not known
	keep    func([]byte) error // nil: nothing is
	failing bool
	log     *slog.Logger
}

// heard keeps u where it is another than what is kept. That it can't be is logged once.
func (k *keeper) heard(u Upstreams) {
	if k.keep == nil {
		return
	}
	said, err := json.Marshal(u)
	if err == nil && bytes.Equal(said, k.last) {
		return
	}
	if err == nil {
		err = k.keep(said)
	}
	if err == nil {
		k.last, k.failing = said, false
		return
	}
	k.last = nil
	if !k.failing {
		k.failing = true
		k.log.Warn("which registries are mirrored was not kept for the next start; it is tried again every 30 s", "error", err)
	}
}

// upstreams is Upstreams with a limit, and none of a build-index that does not know the question.
func (c *IndexClient) upstreams(ctx context.Context) (Upstreams, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	u, err := c.Upstreams(ctx)
	if kind := registry.KindOf(err); err != nil && (kind.Status == http.StatusNotFound || kind.Status == http.StatusMethodNotAllowed) {
		return Upstreams{}, nil
	}
	return u, err
}
