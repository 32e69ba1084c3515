package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
)

// Action is what a request does to a repository.
type Action string

// The actions. ActionEnter is GET /v2/, which is about no repository, as ActionCatalog is. ActionOverwrite moves a tag
// to another manifest, and is asked for beside ActionPush.
const (
	ActionEnter     Action = ""
	ActionPull      Action = "pull"
	ActionPush      Action = "push"
	ActionDelete    Action = "delete"
	ActionOverwrite Action = "overwrite"
	ActionCatalog   Action = "catalog"
)

// Access decides who may do what. A Server asks before each route, after the name and the method were found good.
type Access interface {
	// Allow returns the request's context with the caller in it, or a *ChallengeError (401, with its challenges), or
	// ErrDenied (403).
	Allow(r *http.Request, repository string, action Action) (context.Context, error)
}

// Viewer is an Access that can also be asked about the caller of a request that was allowed, for lists that show what
// the caller may pull, and for mounts. An answer of false is no refusal: nobody is told of it.
type Viewer interface {
	// May reports whether the caller in ctx, which Allow returned, may do action.
	May(ctx context.Context, repository string, action Action) bool
}

// ChallengeError is a request without credentials that suffice, with how to show some. It is an ErrUnauthorized; the
// answer is 401.
type ChallengeError struct {
	Challenges []string // values of WWW-Authenticate, in the order of preference
	Err        error    // why; nil for a request that shows nothing
}

func (e *ChallengeError) Error() string {
	if e.Err == nil {
		return ErrUnauthorized.Message
	}
	return fmt.Sprintf("%s: %s", ErrUnauthorized.Message, e.Err)
}

// Unwrap makes errors.Is(err, ErrUnauthorized) true. Err is told and not unwrapped: whatever it is, the answer is 401.
func (e *ChallengeError) Unwrap() error { return ErrUnauthorized }

// actionOf returns what a request to a kind of route does. Whoever has begun an upload may see how far it is, so that
// every request to one is a push.
func actionOf(kind, method string) Action {
	switch kind {
	case "catalog":
		return ActionCatalog
	case "tags", "referrers":
		return ActionPull
	case "uploads", "upload":
		return ActionPush
	case "manifest", "blob":
		switch method {
		case http.MethodPut:
			return ActionPush
		case http.MethodDelete:
			return ActionDelete
		}
		return ActionPull
	}
	return ActionEnter
}

type mayKey struct{}

// May reports whether the caller of the request that ctx is of may do action at repository. It is true where access is
// not controlled.
func May(ctx context.Context, repository string, action Action) bool {
	may, ok := ctx.Value(mayKey{}).(func(string, Action) bool)
	return !ok || may(repository, action)
}

// Controlled reports whether ctx is of a request to a Server that controls access.
func Controlled(ctx context.Context) bool { return ctx.Value(mayKey{}) != nil }

// allowed asks for a route's action, and returns the request with the caller in its context. Below an extension the
// routes ask for themselves: none is served beside Access.
func (s Server) allowed(r *http.Request, rt route) (*http.Request, error) {
	if s.Access == nil || rt.kind == "extension" {
		return r, nil
	}
	ctx, err := s.Access.Allow(r, rt.repo, actionOf(rt.kind, r.Method))
	if err != nil {
		return r, err
	}
	ctx = context.WithValue(ctx, mayKey{}, func(repository string, action Action) bool {
		if v, ok := s.Access.(Viewer); ok {
			return v.May(ctx, repository, action)
		}
		_, err := s.Access.Allow(r, repository, action)
		return err == nil
	})
	return r.WithContext(ctx), nil
}

// mayOverwrite returns the error for a push that was refused because it would move a tag, where the caller may not:
// the challenge, or the refusal, that Access gives.
func (s Server) mayOverwrite(r *http.Request, repo string, err error) error {
	if s.Access == nil || !errors.Is(err, ErrDenied) || May(r.Context(), repo, ActionOverwrite) {
		return err
	}
	if _, refused := s.Access.Allow(r, repo, ActionOverwrite); refused != nil {
		return refused
	}
	return err
}

// visible is a Catalog that shows the repositories that the caller may pull.
type visible struct{ Catalog }

// minVisiblePage is how many names are asked for at once at least: most may be hidden from the caller.
const minVisiblePage = 1000

// ListRepositories implements Catalog. A page is full as long as there are more names that the caller may see.
func (v visible) ListRepositories(ctx context.Context, p Page) (Names, error) {
	out := Names{}
	if p.N == 0 {
		return v.Catalog.ListRepositories(ctx, p)
	}
	from := Page{N: p.N, Last: p.Last}
	if from.N > 0 {
		from.N = max(from.N, minVisiblePage)
	}
	for {
		l, err := v.Catalog.ListRepositories(ctx, from)
		if err != nil {
			return Names{}, err
		}
		for _, name := range l.Names {
			if !May(ctx, name, ActionPull) {
				continue
			}
			if p.N > 0 && len(out.Names) == p.N {
				out.More = true // and the last name is where the next page begins
				return out, nil
			}
			out.Names = append(out.Names, name)
		}
		if !l.More || len(l.Names) == 0 {
			return out, nil
		}
		from.Last = cmp.Or(l.Next, l.Names[len(l.Names)-1])
	}
}
