package upstream

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// noted is a response writer that remembers the status.
type noted struct {
	http.ResponseWriter
	status func(int)
}

func (n *noted) WriteHeader(status int) {
	n.status(status)
	n.ResponseWriter.WriteHeader(status)
}

// Unwrap lets http.ResponseController see what is below.
func (n *noted) Unwrap() http.ResponseWriter { return n.ResponseWriter }

// note adds a request to the list, and returns a writer that notes its status there.
func (r *Registry) note(w http.ResponseWriter, req *http.Request, q Request) http.ResponseWriter {
	q.Method, q.Range, q.Authorized, q.Host = req.Method, req.Header.Get("Range"), req.Header.Get("Authorization") != "", req.Host
	r.mu.Lock()
	defer r.mu.Unlock()
	r.requests = append(r.requests, &q)
	return &noted{w, func(status int) {
		r.mu.Lock()
		defer r.mu.Unlock()
		q.Status = status
	}}
}

// parse says what a path asks for.
func parse(req *http.Request) Request {
	p, ok := strings.CutPrefix(req.URL.Path, "/v2/")
	if !ok {
		return Request{Kind: "other", Reference: req.URL.Path}
	}
	if p == "" {
		return Request{Kind: "ping"}
	}
	if repo, ok := strings.CutSuffix(p, "/tags/list"); ok {
		return Request{Kind: "tags", Repository: repo}
	}
	for _, k := range []string{"manifests", "blobs", "referrers"} {
		if repo, ref, ok := strings.Cut(p, "/"+k+"/"); ok {
			kind := map[string]string{"manifests": "manifest", "blobs": "blob", "referrers": "referrers"}[k]
			if req.Method == http.MethodHead {
				kind = cmp.Or(map[string]string{"manifests": "head", "blobs": "stat"}[k], kind)
			}
			return Request{Kind: kind, Repository: repo, Reference: ref}
		}
	}
	return Request{Kind: "other", Reference: req.URL.Path}
}

func (r *Registry) serve(w http.ResponseWriter, req *http.Request) {
	q := parse(req)
	q.User, _, _ = req.BasicAuth()
	w = r.note(w, req, q)
	u := r.ruleFor(q)
	if r.before(w, req, u) || !r.allowed(w, req, q.Repository) {
		return
	}
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	switch q.Kind {
	case "ping":
		w.WriteHeader(http.StatusOK)
	case "head", "manifest":
		r.manifest(w, req, q, u)
	case "blob", "stat":
		r.blob(w, req, q, u)
	case "referrers":
		r.referrers(w, req, q, u)
	case "tags":
		r.listTags(w, req, q, u)
	default:
		writeError(w, http.StatusNotFound, "NOT_FOUND", "no such path")
	}
}

func (r *Registry) manifest(w http.ResponseWriter, req *http.Request, q Request, u Rule) {
	r.mu.Lock()
	d, tagged := r.tags[q.Repository+":"+q.Reference]
	if !tagged {
		d = digest.Digest(q.Reference)
	}
	media, member := r.media[d], r.members[q.Repository+"@"+d.String()]
	b := r.blobs[d]
	r.mu.Unlock()
	if media == "" || !member {
		writeError(w, http.StatusNotFound, "MANIFEST_UNKNOWN", "manifest unknown")
		return
	}
	w.Header().Set("Content-Type", media)
	switch {
	case u.Digest != "":
		w.Header().Set("Docker-Content-Digest", u.Digest)
	case !u.NoDigest:
		w.Header().Set("Docker-Content-Digest", d.String())
	}
	r.body(w, req, http.StatusOK, b, u)
}

func (r *Registry) blob(w http.ResponseWriter, req *http.Request, q Request, u Rule) {
	r.mu.Lock()
	b, ok := r.blobs[digest.Digest(q.Reference)]
	ok = ok && r.members[q.Repository+"@"+q.Reference]
	r.mu.Unlock()
	if !ok {
		writeError(w, http.StatusNotFound, "BLOB_UNKNOWN", "blob unknown")
		return
	}
	if r.storage != nil {
		// By another name of this machine, so that it is another host.
		to := strings.Replace(r.storage.URL, "127.0.0.1", "localhost", 1)
		if r.o.TLS {
			to = r.storage.URL // whose certificate is of 127.0.0.1
		}
		w.Header().Set("Location", to+"/storage/"+q.Reference+"?signature="+url.QueryEscape(q.Repository))
		w.WriteHeader(http.StatusTemporaryRedirect)
		return
	}
	r.bytes(w, req, b, u)
}

// bytes sends a blob, or the range of it that is asked for.
func (r *Registry) bytes(w http.ResponseWriter, req *http.Request, b []byte, u Rule) {
	w.Header().Set("Content-Type", "application/octet-stream")
	var first, last int
	spec, ok := strings.CutPrefix(req.Header.Get("Range"), "bytes=")
	if r.o.NoRanges || !ok {
		r.body(w, req, http.StatusOK, b, u)
		return
	}
	from, to, _ := strings.Cut(spec, "-")
	first, err := strconv.Atoi(from)
	if last = len(b) - 1; to != "" && err == nil {
		last, err = strconv.Atoi(to)
	}
	if last = min(last, len(b)-1); err != nil || first > last {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", len(b)))
		writeError(w, http.StatusRequestedRangeNotSatisfiable, "RANGE_INVALID", "no such range")
		return
	}
	w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, len(b)))
	r.body(w, req, http.StatusPartialContent, b[first:last+1], u)
}

// serveStorage is the other host that blobs are read from.
func (r *Registry) serveStorage(w http.ResponseWriter, req *http.Request) {
	q := Request{Kind: "storage", Reference: strings.TrimPrefix(req.URL.Path, "/storage/"), Repository: req.URL.Query().Get("signature")}
	w = r.note(w, req, q)
	u := r.ruleFor(q)
	if r.before(w, req, u) {
		return
	}
	if req.Header.Get("Authorization") != "" {
		writeError(w, http.StatusBadRequest, "UNKNOWN", "only one way to authenticate is allowed")
		return
	}
	r.mu.Lock()
	b := r.blobs[digest.Digest(q.Reference)]
	r.mu.Unlock()
	r.bytes(w, req, b, u)
}

func (r *Registry) referrers(w http.ResponseWriter, req *http.Request, q Request, u Rule) {
	if r.o.NoReferrers {
		writeError(w, http.StatusNotFound, "NOT_FOUND", "404 page not found")
		return
	}
	r.mu.Lock()
	list := slices.Clone(r.subjects[q.Repository+"@"+q.Reference])
	r.mu.Unlock()
	if list == nil {
		list = []v1.Descriptor{}
	}
	w.Header().Set("Content-Type", v1.MediaTypeImageIndex)
	r.body(w, req, http.StatusOK, Marshal(r.t, v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: list}), u)
}

func (r *Registry) listTags(w http.ResponseWriter, req *http.Request, q Request, u Rule) {
	var tags []string
	r.mu.Lock()
	for at := range r.tags {
		if repo, tag, _ := strings.Cut(at, ":"); repo == q.Repository {
			tags = append(tags, tag)
		}
	}
	r.mu.Unlock()
	if tags == nil {
		writeError(w, http.StatusNotFound, "NAME_UNKNOWN", "repository name not known to registry")
		return
	}
	slices.Sort(tags)
	r.body(w, req, http.StatusOK, Marshal(r.t, map[string]any{"name": q.Repository, "tags": tags}), u)
}

func writeError(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(map[string]any{"errors": []map[string]string{{"code": code, "message": message}}})
}

// issued is a token.
type issued struct {
	scopes []string
	until  time.Time
}

// allowed asks for a login where one is needed.
func (r *Registry) allowed(w http.ResponseWriter, req *http.Request, repo string) bool {
	user, password, basic := req.BasicAuth()
	switch {
	case r.o.Basic:
		if other, known := r.o.Others[user]; basic && (user == r.o.User && password == r.o.Password || known && password == other) {
			return true
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="upstream"`)
	case r.o.Token:
		value, _ := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer ")
		r.mu.Lock()
		t, ok := r.tokens[value]
		r.mu.Unlock()
		if ok && time.Now().Before(t.until) && (repo == "" || slices.Contains(t.scopes, "repository:"+repo+":pull")) {
			return true
		}
		scope := ""
		if repo != "" {
			scope = fmt.Sprintf(`,scope="repository:%s:pull"`, repo)
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="upstream"%s`, r.realm.URL, scope))
	default:
		return true
	}
	writeError(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
	return false
}

// serveToken is the token service.
func (r *Registry) serveToken(w http.ResponseWriter, req *http.Request) {
	scopes := req.URL.Query()["scope"]
	q := Request{Kind: "token", Repository: strings.Join(scopes, " ")}
	w = r.note(w, req, q)
	if r.before(w, req, r.ruleFor(q)) {
		return
	}
	user, password, basic := req.BasicAuth()
	if req.Method == http.MethodPost {
		if req.ParseForm() != nil {
			writeError(w, http.StatusBadRequest, "UNKNOWN", "bad form")
			return
		}
		user, password, basic = req.PostForm.Get("username"), req.PostForm.Get("password"), true
		scopes = strings.Fields(req.PostForm.Get("scope"))
	}
	known := basic && user == r.o.User && password == r.o.Password
	if basic && !known || !basic && !r.o.Anonymous {
		writeError(w, http.StatusUnauthorized, "UNAUTHORIZED", "wrong password")
		return
	}
	if !known {
		scopes = slices.DeleteFunc(scopes, func(s string) bool {
			return slices.ContainsFunc(r.o.Private, func(p string) bool { return strings.HasPrefix(s, "repository:"+p) })
		})
	}
	ttl := r.o.TokenTTL
	if ttl == 0 {
		ttl = 5 * time.Minute
	}
	r.mu.Lock()
	value := fmt.Sprintf("token-%d", len(r.tokens)+1)
	r.tokens[value] = issued{scopes, time.Now().Add(ttl)}
	r.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(map[string]any{"token": value, "expires_in": int(ttl.Seconds())})
}

// Revoke makes all tokens count for nothing.
func (r *Registry) Revoke() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for k, t := range r.tokens {
		t.until = time.Time{}
		r.tokens[k] = t
	}
}
