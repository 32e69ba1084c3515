package cluster

import (
	"context"
	"net/http"
	"net/url"
	"strconv"

	"github.com/opencontainers/go-digest"

	"kraken/proto/registry"
)

// IndexClient speaks to a build-index: the manifest half of a registry, and the memberships of blobs in repositories.
// It is safe for concurrent use.
type IndexClient struct{ *registry.Client }

// NewIndexClient returns a client of the build-index at a URL without /v2/.
func NewIndexClient(base string, hc *http.Client) (*IndexClient, error) {
	c, err := registry.NewClientWith(base, hc, registry.ClientOptions{Dialect: Dialect()})
	if err != nil {
		return nil, err
	}
	return &IndexClient{c}, nil
}

// PutLayer makes a blob a member of a repository. It is durable when PutLayer returns nil.
func (c *IndexClient) PutLayer(ctx context.Context, repo string, l Layer) error {
	body, n, err := jsonBody(l)
	if err != nil {
		return err
	}
	_, err = c.Call(ctx, registry.Request{Method: http.MethodPut, To: about(repo, "layers", l.Digest), Header: jsonType, Body: body, Length: n}, http.StatusCreated)
	return err
}

// GetLayer returns the membership of a blob in a repository, registry.ErrBlobUnknown when there is none.
func (c *IndexClient) GetLayer(ctx context.Context, repo string, d digest.Digest) (Layer, error) {
	var l Layer
	_, err := c.CallJSON(ctx, registry.Request{Method: http.MethodGet, To: about(repo, "layers", d)}, &l, http.StatusOK)
	return l, err
}

// ListLayers returns up to n members of a repository whose digests come after last, in the order of digests.
func (c *IndexClient) ListLayers(ctx context.Context, repo string, last digest.Digest, n int) ([]Layer, error) {
	q := url.Values{"n": {strconv.Itoa(n)}}
	if last != "" {
		q.Set("last", last.String())
	}
	var out LayerList
	_, err := c.CallJSON(ctx, registry.Request{Method: http.MethodGet, To: endpoint(repo, "layers", ""), Query: q}, &out, http.StatusOK)
	return out.Layers, err
}

// DeleteLayer ends a membership, registry.ErrBlobUnknown when there is none.
func (c *IndexClient) DeleteLayer(ctx context.Context, repo string, d digest.Digest) error {
	_, err := c.Call(ctx, registry.Request{Method: http.MethodDelete, To: about(repo, "layers", d)}, http.StatusAccepted)
	return err
}

// MountLayer makes a blob that is a member of from, or of any other repository, a member of repo too.
// registry.ErrBlobUnknown when no repository has it.
func (c *IndexClient) MountLayer(ctx context.Context, repo, from string, d digest.Digest) (Layer, error) {
	q := url.Values{}
	if from != "" {
		q.Set("from", from)
	}
	var l Layer
	_, err := c.CallJSON(ctx, registry.Request{Method: http.MethodPost, To: about(repo, "mount", d), Query: q}, &l, http.StatusCreated)
	return l, err
}
