package origin

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"

	"kraken/proto/blob"
	"kraken/proto/registry"
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

// extension serves what origins offer beside the specification (proto/README.md, section 5).
func (o *Origin) extension(w http.ResponseWriter, r *http.Request, x registry.ExtensionPath) error {
	switch x.Resource {
	case "names":
		return o.names(w, r, x)
	case "holder":
		return o.holderRoute(w, r)
	case "pending":
		return o.pending(w, r)
	case "durable":
		return o.durableRoute(w, r, x)
	}
	d, err := blob.ParseDigest(x.Key)
	if err != nil {
		return fmt.Errorf("%w: %w", registry.ErrDigestInvalid, err)
	}
	if err := registry.CheckName(x.Repository); err != nil {
		return err
	}
	switch x.Resource {
	case "blobs":
		return o.blobRoute(w, r, x.Repository, d)
	case "debt":
		return o.debtRoute(w, r, d)
	case "verify":
		return o.verifyRoute(w, r, d)
	case "metainfo":
		return o.metainfoRoute(w, r, x.Repository, d)
	case "arriving":
		return o.arrivingRoute(w, r, x.Repository, d)
	case "lease":
		if r.Method == http.MethodPost {
			return o.leaseRoute(w, r, d)
		}
	}
	return fmt.Errorf("%w: %s %s", registry.ErrUnsupported, r.Method, x.Resource)
}

// ignoreWrite: a response that can't be written any more has no one to be told.
func ignoreWrite(error) error { return nil }
