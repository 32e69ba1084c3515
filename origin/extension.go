package origin

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"

	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

func isTrue(s string) bool { return strings.EqualFold(s, "true") }

// decode reads a bounded JSON body.
func decode(r *http.Request, limit int64, into any) error {
	b, err := readBody(r, limit)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("%w: body: %w", errBody, err)
	}
	return nil
}

func readBody(r *http.Request, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r.Body, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("more than %d bytes", limit)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: body: %w", errBody, err)
	}
	return b, nil
}

var errBody = &registry.Error{Code: "UNSUPPORTED", Status: http.StatusBadRequest, Message: "body is not understood"}

// extension returns what serves what origins offer beside the specification (proto/README.md, section 5).
func (o *Origin) extension() (cluster.Serve, error) {
	about := cluster.AboutBlob
	return cluster.ServeExtension(transport.RoleOrigin, []cluster.Route{
		{Methods: "HEAD GET PUT", Path: "/v2/<name>/_kraken/blobs", Serve: about(o.blobRoute)},
		{Methods: "GET PUT", Path: "/v2/<name>/_kraken/debt", Serve: about(o.debtRoute)},
		{Methods: "GET DELETE", Path: "/v2/<name>/_kraken/metainfo", Serve: about(o.metainfoRoute)},
		{Methods: "GET", Path: "/v2/<name>/_kraken/arriving", Serve: about(o.arrivingRoute)},
		{Methods: "POST", Path: "/v2/<name>/_kraken/verify", Serve: about(o.verifyRoute)},
		{Methods: "POST", Path: "/v2/<name>/_kraken/lease", Serve: about(o.leaseRoute)},
		{Methods: "POST", Path: "/v2/<name>/_kraken/durable", Serve: o.durableRoute},
		{Methods: "PUT", Path: "/v2/<name>/_kraken/names", Serve: o.putName},
		{Methods: "DELETE", Path: "/v2/<name>/_kraken/names", Serve: o.deleteName},
		{Methods: "GET", Path: "/v2/_kraken/names", Serve: o.allNames},
		{Methods: "GET", Path: "/v2/_kraken/pending", Serve: o.pending},
		{Methods: "PUT", Path: "/v2/_kraken/holder", Serve: o.holderRoute},
	})
}

// ignoreWrite: a response that can't be written any more has no one to be told.
func ignoreWrite(error) error { return nil }
