// Package cluster is what the roles of a cluster say to each other beyond the OCI Distribution API: the messages and
// headers of the extension /v2/<name>/_kraken/, a client of an origin and one of a build-index, the origins of a
// cluster with who owns what, and records of names. Content itself goes by package registry. The text is in
// proto/README.md, section 5.
//
// The package holds no state of a role and decides nothing for one.
package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strconv"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
	"kraken/proto/registry"
)

// ExtensionName is the path element below which the extension is.
const ExtensionName = "_kraken"

// ExtensionVersion is the version of the messages, sent with every request. A server refuses a greater one with 400.
const ExtensionVersion = 1

// Headers between roles.
const (
	VersionHeader = "Kraken-Version"
	// PeerHeader is the peer id of an agent in its reads of ranges, so that an origin knows who fetches what it leases.
	PeerHeader = "Kraken-Peer"
	// WritebackHeader makes who is given a copy of a blob owe it to the bucket too.
	WritebackHeader = "Kraken-Writeback"
	// AwayHeader is in each 503 of a build-index, "true" or "false": whether it is the build-index itself that is away
	// for a moment.
	AwayHeader = "Kraken-Away"
)

// IsAway reports whether an answer says that the build-index is away for a moment: it begins or ends, is not sure to be
// the only one, or is restoring the name. So is a 503 that does not say, of an older version or of whoever is between.
func IsAway(resp *http.Response) bool {
	return resp.StatusCode == http.StatusServiceUnavailable && resp.Header.Get(AwayHeader) != "false"
}

// Dialect returns what makes a registry's client and server speak the extension.
func Dialect() registry.Dialect {
	return registry.Dialect{
		Extension: ExtensionName,
		Digest:    "Kraken-Digest", Size: "Kraken-Size", Source: "Kraken-Source", Offset: "Kraken-Offset", KeepTags: "Kraken-Keep-Tags",
		Decorate: decorate, Check: checkVersion,
	}
}

// decorate adds to a request the headers that all requests between roles have.
func decorate(r *http.Request) {
	r.Header.Set(VersionHeader, strconv.Itoa(ExtensionVersion))
	if peer, ok := r.Context().Value(peerKey{}).(string); ok {
		r.Header.Set(PeerHeader, peer)
	}
	carry(r)
}

var errVersion = &registry.Error{Code: "UNSUPPORTED", Status: http.StatusBadRequest, Message: "version is not supported"}

// checkVersion returns an error, answered by 400, for a request of a version that is not known here.
func checkVersion(r *http.Request) error {
	if v := r.Header.Get(VersionHeader); v != "" {
		if n, err := strconv.Atoi(v); err != nil || n > ExtensionVersion {
			return fmt.Errorf("%w: %s %.20q, this server knows up to %d", errVersion, VersionHeader, v, ExtensionVersion)
		}
	}
	return nil
}

type peerKey struct{}

// WithPeer returns a context whose requests say which agent reads: peer is its id, 40 hex digits.
func WithPeer(ctx context.Context, peer string) context.Context {
	return context.WithValue(ctx, peerKey{}, peer)
}

// endpoint returns where a resource of the extension is in a repository; key may be empty.
func endpoint(repo, resource, key string) registry.Endpoint {
	if err := registry.CheckName(repo); err != nil {
		return registry.NoEndpoint(err)
	}
	return registry.ExtensionPath{Extension: ExtensionName, Repository: repo, Resource: resource, Key: key}.Endpoint()
}

// everywhere returns where a resource is that is about all repositories.
func everywhere(resource string) registry.Endpoint {
	return registry.ExtensionPath{Extension: ExtensionName, Resource: resource}.Endpoint()
}

// about returns where a resource about one digest is.
func about(repo, resource string, d digest.Digest) registry.Endpoint {
	if _, err := blob.ParseDigest(d.String()); err != nil {
		return registry.NoEndpoint(fmt.Errorf("%w: %w", registry.ErrDigestInvalid, err))
	}
	return endpoint(repo, resource, d.String())
}

var recordKey = regexp.MustCompile(`^[0-9a-f]{64}$`)

// recordOf returns where an origin keeps the record of a NameKey.
func recordOf(repo, key string) registry.Endpoint {
	if !recordKey.MatchString(key) {
		return registry.NoEndpoint(fmt.Errorf("%w: key %.80q", registry.ErrRecordInvalid, key))
	}
	return endpoint(repo, "names", key)
}

func jsonBody(v any) (io.Reader, int64, error) {
	b, err := json.Marshal(v)
	return bytes.NewReader(b), int64(len(b)), err
}

// post sends in and decodes the answer into out, both as JSON.
func post(ctx context.Context, c *registry.Client, to registry.Endpoint, in, out any) error {
	body, n, err := jsonBody(in)
	if err != nil {
		return err
	}
	_, err = c.CallJSON(ctx, registry.Request{Method: http.MethodPost, To: to, Header: jsonType, Body: body, Length: n}, out, http.StatusOK)
	return err
}

var jsonType = http.Header{"Content-Type": {"application/json"}}
