package registry

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
)

// The grammar of the specification ("Pulling manifests"), with the usual bound on a name's length.
var (
	nameGrammar = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagGrammar  = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
)

const maxName = 255

// reserved are the routes that consist of words which could all be elements of a name. Below a repository of that name
// every path would begin like a route of a shorter one: /v2/a/blobs/uploads/… is the upload sessions of a. Other
// words of the API (manifests, blobs, …) are fine, because the one segment after them decides, and paths are read
// from the right.
var reserved = []string{"blobs/uploads", "tags/list"}

// CheckName returns nil for a repository name, ErrNameInvalid for anything else.
func CheckName(s string) error {
	if len(s) > maxName || !nameGrammar.MatchString(s) {
		return fmt.Errorf("%w: %.300q: want lower case path elements, at most %d bytes", ErrNameInvalid, s, maxName)
	}
	for _, r := range reserved {
		if strings.Contains("/"+s+"/", "/"+r+"/") {
			return fmt.Errorf("%w: %.300q: %s is a route of the API, and can't be a part of a name", ErrNameInvalid, s, r)
		}
	}
	return nil
}

// ParseReference returns the tag or the digest that s is. ErrTagInvalid, ErrDigestInvalid.
func ParseReference(s string) (Reference, error) {
	if strings.Contains(s, ":") {
		d, err := parseDigest(s)
		return Reference{Digest: d}, err
	}
	if err := CheckTag(s); err != nil {
		return Reference{}, err
	}
	return Reference{Tag: s}, nil
}

// CheckTag returns nil for a tag, ErrTagInvalid for anything else.
func CheckTag(s string) error {
	if tagGrammar.MatchString(s) {
		return nil
	}
	return fmt.Errorf("%w: %.200q: want at most 128 of [a-zA-Z0-9._-], not beginning with . or -", ErrTagInvalid, s)
}

func parseDigest(s string) (digest.Digest, error) {
	d, err := blob.ParseDigest(s)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrDigestInvalid, err)
	}
	return d, nil
}

// route is a request path under /v2/, read from the right, because repository names contain slashes.
type route struct {
	kind string // "", catalog, blob, uploads, upload, manifest, tags, referrers, extension
	repo string
	arg  string // digest, reference, session id, or what begins with an extension's name
}

// parseRoute splits the path after "/v2/". ok is false for a path that is no route.
func parseRoute(p string) (rt route, ok bool) {
	if p == "" {
		return route{}, true
	}
	if p == "_catalog" {
		return route{kind: "catalog"}, true
	}
	if repo, rest, found := cutExtension(p); found {
		return route{"extension", repo, rest}, isResource(rest)
	}
	if repo, found := strings.CutSuffix(p, "/tags/list"); found {
		return route{kind: "tags", repo: repo}, true
	}
	if repo, found := strings.CutSuffix(strings.TrimSuffix(p, "/"), "/blobs/uploads"); found {
		return route{kind: "uploads", repo: repo}, true
	}
	dir, last, found := cutLast(p)
	if !found {
		return route{}, false
	}
	for suffix, kind := range map[string]string{"/blobs/uploads": "upload", "/blobs": "blob", "/manifests": "manifest", "/referrers": "referrers"} {
		if repo, found := strings.CutSuffix(dir, suffix); found && (kind != "blob" || last != "uploads") {
			return route{kind, repo, last}, true
		}
	}
	return route{}, false
}

// cutExtension returns what is before the first segment that begins with an underscore, and the rest from there; such a
// segment is no element of a name. The last segment may be a tag or the id of a session, and is not looked at.
func cutExtension(p string) (repo, rest string, found bool) {
	for at := 0; ; {
		n := strings.IndexByte(p[at:], '/')
		switch {
		case n < 0:
			return "", "", false
		case p[at] == '_':
			return strings.TrimSuffix(p[:at], "/"), p[at:], at != 1
		}
		at += n + 1
	}
}

// isResource reports whether p is an extension's name and a resource of it, with a key or without: two or three
// segments, none of them empty.
func isResource(p string) bool {
	parts := strings.Split(p, "/")
	return (len(parts) == 2 || len(parts) == 3) && !slices.Contains(parts, "")
}

// hidesSlash reports whether a path as it was sent has an escaped slash or backslash. Decoded it would have other
// segments than the ones that whoever stands in front has seen. Nothing of the API needs one.
func hidesSlash(raw string) bool {
	raw = strings.ToLower(raw)
	return strings.Contains(raw, "%2f") || strings.Contains(raw, "%5c")
}

func cutLast(p string) (dir, last string, ok bool) {
	i := strings.LastIndexByte(p, '/')
	if i < 0 {
		return "", p, false
	}
	return p[:i], p[i+1:], true
}
