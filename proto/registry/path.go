package registry

import (
	"fmt"
	"net/url"
	"regexp"
	"strings"

	"github.com/opencontainers/go-digest"
)

// endpoint is where a Client's request goes. Only route.endpoint makes one that can be sent: each part has been checked
// against the grammar of its kind and is escaped as one path segment, so that no value leads to another route than the
// one that was meant.
type endpoint struct {
	path string // begins with /v2/
	err  error  // why there is none; the request is not sent
}

// endpoint returns the path of a route, or the error of the first part that is not of its grammar.
func (rt route) endpoint() endpoint {
	p, err := rt.path()
	if err != nil {
		return endpoint{err: err}
	}
	return endpoint{path: "/v2/" + p}
}

// path is the inverse of parseRoute for every route whose parts are valid.
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
	"tags": {"tags", "list"}, "referrers": {"referrers"}, "extension": {"_kraken"},
}

// checkArg refuses an argument that is not of the grammar of the route's kind.
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
		resource, key, _ := strings.Cut(rt.arg, "/")
		err = checkResource(resource, key)
	default:
		if rt.arg != "" {
			err = fmt.Errorf("%w: %s with %.80q", errPath, rt.kind, rt.arg)
		}
	}
	return err
}

var recordKey = regexp.MustCompile(`^[0-9a-f]{64}$`)

// checkResource knows the resources of the extension and what their keys are.
func checkResource(resource, key string) error {
	switch resource {
	case "blobs", "metainfo", "lease", "layers", "mount":
		_, err := parseDigest(key)
		return err
	case "names":
		if key == "" || recordKey.MatchString(key) {
			return nil
		}
	case "pending", "durable":
		if key == "" {
			return nil
		}
	}
	return fmt.Errorf("%w: no such resource: %.80q, %.80q", errPath, resource, key)
}

func blobPath(repo string, d digest.Digest) endpoint {
	return route{"blob", repo, d.String()}.endpoint()
}

func uploadsPath(repo string) endpoint { return route{"uploads", repo, ""}.endpoint() }

func uploadPath(repo, id string) endpoint { return route{"upload", repo, id}.endpoint() }

func manifestPath(repo string, ref Reference) endpoint {
	return route{"manifest", repo, ref.String()}.endpoint()
}

func tagsPath(repo string) endpoint { return route{"tags", repo, ""}.endpoint() }

func referrersPath(repo string, d digest.Digest) endpoint {
	return route{"referrers", repo, d.String()}.endpoint()
}

// extensionPath is a resource about one digest.
func extensionPath(repo, resource string, d digest.Digest) endpoint {
	return route{"extension", repo, resource + "/" + d.String()}.endpoint()
}

// recordPath is where an origin keeps the record of a NameKey.
func recordPath(repo, key string) endpoint {
	return route{"extension", repo, "names/" + key}.endpoint()
}

// resourcePath is a resource without a key; repo may be empty for those that are about all repositories.
func resourcePath(repo, resource string) endpoint {
	return route{"extension", repo, resource}.endpoint()
}
