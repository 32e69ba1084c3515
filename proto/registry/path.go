package registry

import (
	"fmt"
	"net/url"
	"regexp"
	"strings"

	"github.com/opencontainers/go-digest"
)

// Endpoint is where a Client's request goes. Only route.endpoint makes one that can be sent: each part has been checked
// against the grammar of its kind and is escaped as one path segment, so that no value leads to another route than the
// one that was meant.
type Endpoint struct {
	path     string // begins with /v2/
	kind     string // of the route
	location string // the URL that a registry named for a session, in place of path
	repo     string
	session  string // id of an upload session
	err      error  // why there is none; the request is not sent
}

// endpoint returns the path of a route, or the error of the first part that is not of its grammar.
func (rt route) endpoint() Endpoint {
	p, err := rt.path()
	if err != nil {
		return Endpoint{err: err}
	}
	return Endpoint{path: "/v2/" + p, kind: rt.kind, repo: rt.repo}
}

// path returns the path of a route below /v2/: the inverse of parseRoute for every route whose parts are valid.
func (rt route) path() (string, error) {
	switch rt.kind {
	case "":
		return "", nil
	case "catalog":
		return "_catalog", nil
	}
	words, ok := routeWords[rt.kind]
	if !ok {
		return "", fmt.Errorf("%w: no route of kind %q", errPath, rt.kind)
	}
	var segments []string
	if rt.repo != "" || rt.kind != "extension" {
		if err := CheckName(rt.repo); err != nil {
			return "", err
		}
		segments = strings.Split(rt.repo, "/")
	}
	if err := rt.checkArg(); err != nil {
		return "", err
	}
	segments = append(segments, words...)
	switch rt.kind {
	case "tags":
	case "extension":
		segments = append(segments, strings.Split(rt.arg, "/")...)
	default:
		segments = append(segments, rt.arg) // empty for "uploads", whose path ends with a slash
	}
	for i, s := range segments {
		segments[i] = url.PathEscape(s)
	}
	return strings.Join(segments, "/"), nil
}

// routeWords are the fixed segments of each kind of route, between the repository and the argument.
var routeWords = map[string][]string{
	"blob": {"blobs"}, "uploads": {"blobs", "uploads"}, "upload": {"blobs", "uploads"}, "manifest": {"manifests"},
	"tags": {"tags", "list"}, "referrers": {"referrers"}, "extension": {},
}

// extensionGrammar is an extension's name, a resource, and a key that is no relative path.
var extensionGrammar = regexp.MustCompile(`^_[a-z0-9]+/[a-z]+(/[A-Za-z0-9][A-Za-z0-9:._-]*)?$`)

// checkArg returns an error of the table for an argument that is not of the grammar of the route's kind.
func (rt route) checkArg() error {
	var err error
	switch rt.kind {
	case "blob", "referrers":
		_, err = parseDigest(rt.arg)
	case "manifest":
		_, err = ParseReference(rt.arg)
	case "upload":
		if !sessionID(rt.arg) {
			err = fmt.Errorf("%w: %.80q", ErrBlobUploadUnknown, rt.arg)
		}
	case "extension":
		if !extensionGrammar.MatchString(rt.arg) {
			err = fmt.Errorf("%w: no such resource: %.80q", errPath, rt.arg)
		}
	default:
		if rt.arg != "" {
			err = fmt.Errorf("%w: %s with %.80q", errPath, rt.kind, rt.arg)
		}
	}
	return err
}

func blobPath(repo string, d digest.Digest) Endpoint {
	return route{"blob", repo, d.String()}.endpoint()
}

// BlobEndpoint returns where a blob of a repository is.
func BlobEndpoint(repo string, d digest.Digest) Endpoint { return blobPath(repo, d) }

func uploadsPath(repo string) Endpoint { return route{"uploads", repo, ""}.endpoint() }

func manifestPath(repo string, ref Reference) Endpoint {
	return route{"manifest", repo, ref.String()}.endpoint()
}

func tagsPath(repo string) Endpoint { return route{"tags", repo, ""}.endpoint() }

func referrersPath(repo string, d digest.Digest) Endpoint {
	return route{"referrers", repo, d.String()}.endpoint()
}

// Endpoint returns where a Client finds the resource.
func (x ExtensionPath) Endpoint() Endpoint {
	return route{"extension", x.Repository, strings.TrimSuffix(x.Extension+"/"+x.Resource+"/"+x.Key, "/")}.endpoint()
}

// NoEndpoint returns an Endpoint that no request is sent to: a Client returns err instead.
func NoEndpoint(err error) Endpoint { return Endpoint{err: err} }

// String returns the path.
func (e Endpoint) String() string { return e.path }
