package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
)

// Namer says which repository a request means. It is asked before anything else is, for every request, and answers from
// memory.
type Namer interface {
	// Repository returns the repository that a client means by path, and by the registry's name that it gave as ?ns=,
	// which may be empty. An empty path asks whether anything is served for that name: the result is empty for names
	// of this registry's own. ErrNameUnknown: there is no such repository here, and nobody need be asked.
	Repository(namespace, path string) (string, error)
}

// Asked is how a client called a repository, and whether it wants a range.
type Asked struct {
	Namespace string // ?ns=, empty without
	Path      string
	Ranged    bool // the request has a Range
}

type askedKey struct{}

// AskedOf returns how the client of a request called the repository; ok is false outside of requests to a Server with a
// Namer.
func AskedOf(ctx context.Context) (a Asked, ok bool) {
	a, ok = ctx.Value(askedKey{}).(Asked)
	return a, ok
}

// named returns the route with the repository that is meant, and the request with how it was called in its context.
func (s Server) named(w http.ResponseWriter, r *http.Request, rt route) (*http.Request, route, error) {
	ns := r.URL.Query().Get("ns")
	if ns != "" {
		w.Header().Set("OCI-Namespace", ns)
	}
	if s.Namer == nil || rt.kind == "extension" {
		return r, rt, nil
	}
	repo, err := s.Namer.Repository(ns, rt.repo)
	if err == nil && rt.kind == "catalog" && repo != "" {
		err = fmt.Errorf("%w: the repositories of %.100q can't be listed", ErrNameUnknown, repo)
	}
	if err != nil {
		w.Header().Del("OCI-Namespace")
		if s.Mirror && errors.Is(err, ErrNameUnknown) && rt.kind == "manifest" && fallbackTag.MatchString(rt.arg) {
			// The runtime takes 404 for "there is no signature", and asks nobody else.
			err = fmt.Errorf("%w: %v, so whether it has %s is not known", ErrUnavailable, err, rt.arg)
		}
		return r, rt, err
	}
	if rt.repo == "" {
		return r, rt, nil
	}
	r = r.WithContext(context.WithValue(r.Context(), askedKey{}, Asked{ns, rt.repo, r.Header.Get("Range") != ""}))
	rt.repo = repo
	return r, rt, nil
}

// fallbackTag is a tag under which clients keep what refers to a digest where a registry has no referrers API, and
// cosign its signatures.
var fallbackTag = regexp.MustCompile(`^sha256-[0-9a-f]{64}(\.[a-z]+)?$`)

// askedName returns what the client calls the repository that its path names, or repo where that is not known.
func askedName(ctx context.Context, repo string) string {
	if a, ok := AskedOf(ctx); ok {
		return a.Path
	}
	return repo
}

// ofMirror returns the error that a mirror answers in the place of err. Runtimes repeat what is answered 429 at once,
// and go on to the next registry after 503.
func ofMirror(err error) error {
	switch kind := KindOf(err); {
	case kind == ErrUnavailable:
		return err
	case kind == ErrInternal:
		return fmt.Errorf("%w: %s", ErrUnavailable, ErrInternal.Message)
	case kind.Status == http.StatusTooManyRequests, kind.Status >= http.StatusInternalServerError:
		return withKind{ErrUnavailable, err}
	}
	return err
}

// withKind is err as another entry of the table.
type withKind struct {
	kind *Error
	err  error
}

func (e withKind) Error() string   { return e.err.Error() }
func (e withKind) Unwrap() []error { return []error{e.kind, e.err} }
