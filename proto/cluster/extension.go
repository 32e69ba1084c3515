package cluster

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// Serve answers a request of the extension; an error is answered by the table of package registry.
type Serve func(w http.ResponseWriter, r *http.Request, x registry.ExtensionPath) error

// Route is what a role answers at one path of the extension. Methods and Path are spelled as in Right, but that HEAD is
// served only where it is named, beside GET: an answer to GET may be the beginning of work, and nobody asks for that
// without wanting the answer. Who has the right to GET has that to HEAD.
type Route struct {
	Methods, Path string
	Serve         Serve
}

// ServeExtension returns what serves the routes at a role's main listener. Routes and the rows of Rights for the
// extension there must be the same, or it is an error that names the others: so nothing is served that no certificate
// opens on a cluster with mutual TLS, and no role can start that would.
func ServeExtension(at transport.Role, routes []Route) (Serve, error) {
	by, has := map[string]Serve{}, map[string]bool{}
	for _, rt := range routes {
		for _, method := range strings.Fields(rt.Methods) {
			if by[method+" "+rt.Path] = rt.Serve; method != http.MethodHead {
				has[method+" "+rt.Path] = true
			}
		}
	}
	var errs []error
	for _, rt := range routes {
		if methods := strings.Fields(rt.Methods); slices.Contains(methods, http.MethodHead) && !slices.Contains(methods, http.MethodGet) {
			errs = append(errs, fmt.Errorf("HEAD %s is served at %s without GET", rt.Path, at))
		}
	}
	for _, row := range Rights {
		if row.At != string(at) || !strings.Contains(row.Path, "/"+ExtensionName+"/") {
			continue
		}
		for _, method := range strings.Fields(row.Methods) {
			if key := method + " " + row.Path; !has[key] {
				errs = append(errs, fmt.Errorf("rights at %s have a row for %s, which is not served", at, key))
			} else {
				delete(has, key)
			}
		}
	}
	for key := range has {
		errs = append(errs, fmt.Errorf("%s is served at %s, and rights have no row for it", key, at))
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return func(w http.ResponseWriter, r *http.Request, x registry.ExtensionPath) error {
		if serve := by[r.Method+" "+x.Pattern()]; serve != nil {
			return serve(w, r, x)
		}
		return fmt.Errorf("%w: %.20q %s", registry.ErrUnsupported, r.Method, x.Resource)
	}, errors.Join(errs...)
}

// AboutBlob is a Serve for a resource whose key is a digest, in a repository.
func AboutBlob(serve func(w http.ResponseWriter, r *http.Request, repo string, d digest.Digest) error) Serve {
	return func(w http.ResponseWriter, r *http.Request, x registry.ExtensionPath) error {
		d, err := blob.ParseDigest(x.Key)
		if err != nil {
			return fmt.Errorf("%w: %w", registry.ErrDigestInvalid, err)
		}
		if err := registry.CheckName(x.Repository); err != nil {
			return err
		}
		return serve(w, r, x.Repository, d)
	}
}
