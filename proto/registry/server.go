package registry

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"

	"kraken/proto/transport"
)

// ExtensionPath is what an extension is asked for: /v2/<Repository>/<Extension>/<Resource>/<Key>. Repository and Key
// may be empty; Extension begins with an underscore.
type ExtensionPath struct{ Extension, Repository, Resource, Key string }

// Server serves the parts that are set; a nil part answers 405 UNSUPPORTED.
type Server struct {
	Blobs          Blobs
	BlobDeleter    BlobDeleter
	Uploads        Uploads
	Mounter        Mounter
	Manifests      Manifests
	ManifestWriter ManifestWriter
	Tags           Tags
	Catalog        Catalog
	Referrers      Referrers
	// Dialect is what requests and answers may have beyond the specification.
	Dialect Dialect
	// Extension serves what is below the dialect's extension; an error is answered by the table.
	Extension func(w http.ResponseWriter, r *http.Request, x ExtensionPath) error
	// Namer says which repository a request means; nil: the one in its path, whatever ?ns= says.
	Namer Namer
	// Mirror says that runtimes ask this server before the registry that a name is of: what can't be read here is 404
	// or 503, and never 429.
	Mirror bool
	// ChunkMinLength, where set, is the length in bytes that clients are asked to give their chunks at least
	// (OCI-Chunk-Min-Length). Shorter ones are taken as well: which one is the last can't be told from a chunk.
	ChunkMinLength int64
	// TrustSource, where set, reports whether a request may be a proxy's, whose header (Dialect.Source) names the
	// source of an upload. Else an upload's source is the connection's address.
	TrustSource func(r *http.Request) bool
	// Access, where set, decides who may do what; Private is then set, too. Nil: everybody may do everything.
	Access Access
	// Private says that who may read what is controlled, so that no cache that several share may keep a blob.
	Private bool
	// ReadOnly is what a client that tries to write is told, beside 405.
	ReadOnly string
	Log      *slog.Logger
}

// maxPage bounds the names of one page.
const maxPage = 10_000

// Handler serves /v2/.
func (s Server) Handler() http.Handler {
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	if s.Access != nil {
		s.Private = true
		if s.Catalog != nil {
			s.Catalog = visible{s.Catalog}
		}
	}
	r := chi.NewRouter()
	r.HandleFunc("/v2", s.serve)
	r.HandleFunc("/v2/*", s.serve)
	r.NotFound(func(w http.ResponseWriter, r *http.Request) {
		WriteError(w, r, fmt.Errorf("%w: no such path %.200q", errPath, r.URL.Path))
	})
	r.MethodNotAllowed(UnknownMethod)
	return r
}

// UnknownMethod answers methods that chi has never heard of, which it would do without a body. A router around a
// Server's Handler needs it too.
func UnknownMethod(w http.ResponseWriter, r *http.Request) {
	WriteError(w, r, fmt.Errorf("%w: %.20q", ErrUnsupported, r.Method))
}

var errPath = &Error{"NOT_FOUND", http.StatusNotFound, "not found"}

func (s Server) serve(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	body := markBody(r)
	err := body.blame(s.dispatch(w, r))
	if err == nil {
		return
	}
	switch kind := KindOf(err); {
	case r.Context().Err() != nil:
		s.Log.Debug("client went away", "method", r.Method, "path", r.URL.Path, "error", err)
		// nobody is there for an answer, and one of 500 would be counted as this server's error
		panic(http.ErrAbortHandler)
	case kind.Status >= 500 && expected(err):
		s.Log.Debug("request has to come again", "method", r.Method, "path", r.URL.Path, "status", kind.Status, "error", err)
	case kind.Status >= 500:
		s.Log.Warn("request failed", "method", r.Method, "path", r.URL.Path, "status", kind.Status, "error", err)
	}
	if s.Mirror && reads(r) {
		err = ofMirror(err)
	}
	s.Dialect.WriteError(w, r, err)
}

func expected(err error) bool {
	var r *RetryError
	return errors.As(err, &r) && r.Expected
}

func (s Server) dispatch(w http.ResponseWriter, r *http.Request) error {
	rt, ok := parseRoute(strings.TrimPrefix(strings.TrimPrefix(r.URL.Path, "/v2"), "/"))
	if !ok || hidesSlash(r.URL.RawPath) {
		return fmt.Errorf("%w: no such path %.200q", errPath, r.URL.Path)
	}
	if err := s.checkRequest(r); err != nil {
		return err
	}
	knownUnit(r.Header)
	if rt.repo != "" || (rt.kind != "" && rt.kind != "catalog" && rt.kind != "extension") {
		if err := CheckName(rt.repo); err != nil {
			return err
		}
	}
	if done, err := s.checkMethod(w, r, rt.kind); done {
		return err
	}
	r, rt, err := s.named(w, r, rt)
	if err != nil {
		return err
	}
	r, err = s.allowed(r, rt)
	if err != nil {
		return err
	}
	switch rt.kind {
	case "":
		return transport.WriteJSON(w, http.StatusOK, struct{}{})
	case "catalog":
		return s.catalog(w, r)
	case "tags":
		return s.tags(w, r, rt.repo)
	case "referrers":
		return s.referrers(w, r, rt.repo, rt.arg)
	case "manifest":
		return s.manifest(w, r, rt.repo, rt.arg)
	case "blob":
		return s.blob(w, r, rt.repo, rt.arg)
	case "uploads":
		return s.startUpload(w, r, rt.repo)
	case "upload":
		return s.upload(w, r, rt.repo, rt.arg)
	}
	x := extensionOf(rt)
	if s.Extension == nil || x.Extension != s.Dialect.Extension {
		return fmt.Errorf("%w: no such path %.200q", errPath, r.URL.Path)
	}
	return s.Extension(w, r, x)
}

// extensionOf returns what a route of the kind extension asks for.
func extensionOf(rt route) ExtensionPath {
	x := ExtensionPath{Repository: rt.repo}
	x.Extension, x.Resource, _ = strings.Cut(rt.arg, "/")
	x.Resource, x.Key, _ = strings.Cut(x.Resource, "/")
	return x
}

func (s Server) checkRequest(r *http.Request) error {
	if s.Dialect.Check != nil {
		if err := s.Dialect.Check(r); err != nil {
			return err
		}
	}
	return nil
}

// page returns the page that the query's n and last ask for, ErrPaginationInvalid when n is no number.
func page(r *http.Request) (Page, error) {
	q := r.URL.Query()
	p := Page{N: maxPage, Last: q.Get("last")}
	if v := q.Get("n"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 0 {
			return p, fmt.Errorf("%w: n=%.20q", ErrPaginationInvalid, v)
		}
		p.N = min(n, maxPage)
	}
	return p, nil
}

// next sets the Link to the page after l (RFC 8288), when there is one.
func next(w http.ResponseWriter, r *http.Request, p Page, l Names) {
	if !l.More || len(l.Names) == 0 {
		return
	}
	q := r.URL.Query()
	q.Set("n", strconv.Itoa(p.N))
	q.Set("last", cmp.Or(l.Next, l.Names[len(l.Names)-1]))
	w.Header().Set("Link", fmt.Sprintf(`<%s?%s>; rel="next"`, r.URL.Path, q.Encode()))
}

func (s Server) tags(w http.ResponseWriter, r *http.Request, repo string) error {
	p, err := page(r)
	if err != nil {
		return err
	}
	l, err := s.Tags.ListTags(r.Context(), repo, p)
	if err != nil {
		return err
	}
	next(w, r, p, l)
	return transport.WriteJSON(w, http.StatusOK, tagList{askedName(r.Context(), repo), nonNil(l.Names)})
}

type tagList struct {
	Name string   `json:"name"`
	Tags []string `json:"tags"`
}

type repositoryList struct {
	Repositories []string `json:"repositories"`
}

func nonNil(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}

func (s Server) catalog(w http.ResponseWriter, r *http.Request) error {
	p, err := page(r)
	if err != nil {
		return err
	}
	l, err := s.Catalog.ListRepositories(r.Context(), p)
	if err != nil {
		return err
	}
	next(w, r, p, l)
	return transport.WriteJSON(w, http.StatusOK, repositoryList{nonNil(l.Names)})
}

// errorBody is the specification's JSON.
type errorBody struct {
	Errors []errorDetail `json:"errors"`
}

type errorDetail struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Detail  any    `json:"detail,omitempty"`
}

// messageOf returns the text that a client is told of err; the whole of err is for the log. What broke inside is not
// told at all. Failures of this side are told without addresses, files and URLs. Mistakes of the client quote its
// request, which may have some.
func messageOf(kind *Error, err error) string {
	switch {
	case kind == ErrInternal:
		return ErrInternal.Message
	case kind.Status >= http.StatusInternalServerError:
		return transport.Public(err)
	}
	return transport.PublicCause(err)
}

// WriteError answers by the table, and says nothing of addresses. A *RangeError adds the session's Location and Range,
// a *RetryError Retry-After, a *ChallengeError its challenges.
func WriteError(w http.ResponseWriter, r *http.Request, err error) {
	Dialect{}.WriteError(w, r, err)
}

// WriteError is the function WriteError, with what this dialect adds.
func (d Dialect) WriteError(w http.ResponseWriter, r *http.Request, err error) {
	kind := KindOf(err)
	h := w.Header()
	var re *RangeError
	if errors.As(err, &re) {
		d.uploadHeaders(h, sessionsOf(r.URL.Path), re.Upload)
	}
	var challenge *ChallengeError
	if errors.As(err, &challenge) {
		for _, c := range challenge.Challenges {
			h.Add("WWW-Authenticate", c)
		}
	}
	var retry *RetryError
	if errors.As(err, &retry) {
		h.Set("Retry-After", strconv.Itoa(max(1, int(retry.After.Round(time.Second)/time.Second))))
	} else if kind == ErrUnavailable || kind == ErrTooManyRequests {
		h.Set("Retry-After", "1")
	}
	if d.Away != "" && kind == ErrUnavailable {
		h.Set(d.Away, strconv.FormatBool(retry != nil && retry.Away))
	}
	message := messageOf(kind, err)
	b, jerr := json.Marshal(errorBody{[]errorDetail{{Code: kind.Code, Message: message}}})
	if jerr != nil {
		b = []byte(`{"errors":[{"code":"UNKNOWN","message":"internal error"}]}`)
	}
	for _, name := range []string{"ETag", "Docker-Content-Digest", "Cache-Control", "Link"} {
		h.Del(name)
	}
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(b)))
	w.WriteHeader(kind.Status)
	if r.Method != http.MethodHead {
		w.Write(b) // an error here is a client that went away
	}
}

// detached returns ctx without its end, for what must be finished although the client has gone.
func detached(ctx context.Context) context.Context { return context.WithoutCancel(ctx) }
