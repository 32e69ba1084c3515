package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/registry"
)

// AccessState is what proxies and agents share of who may come in (GET /v2/_kraken/access).
type AccessState struct {
	Keys   []TokenKey `json:"keys"`
	Robots []Robot    `json:"robots"`
	// ETag is what build-index calls this state, so that it need not be told again.
	ETag string `json:"-"`
}

// TokenKey is a public key that tokens are signed with (PUT /v2/_kraken/tokenkeys/<id>). Each proxy makes its own, and
// its private half stays there. While it signs it puts the key again and again, each time with a later end, so that the
// key of a proxy that is gone ends soon.
type TokenKey struct {
	ID      string          `json:"id"`
	JWK     json.RawMessage `json:"jwk"`
	Expires time.Time       `json:"expires"` // after this no token of it is valid
	// Owner is whose certificate it was put with, or else from which address; build-index says it.
	Owner string `json:"owner,omitempty"`
}

// Robot is a key for programs (PUT, DELETE /v2/_kraken/robots/<name>).
type Robot struct {
	Name string `json:"name"`
	// Hash is the SHA-256 of the key, in hex: the key is random and long enough. Only proxies are told it.
	Hash    string    `json:"hash,omitempty"`
	Created time.Time `json:"created"` // by build-index
	Expires time.Time `json:"expires"`
	Note    string    `json:"note,omitempty"`
	// Generation is random, and another each time that a robot of this name is put: build-index makes it. A token of
	// the robot has the one that it was given for, and ends with it.
	Generation string `json:"generation,omitempty"`
}

// Limits of what is kept.
const (
	MaxTokenKeys   = 1000 // beyond it, those go that end first
	MaxOwnKeys     = 200  // of one owner, likewise
	MaxRobots      = 10_000
	MaxAccessEntry = 4 << 10 // bytes of one
	MaxRobotsSize  = 8 << 20 // of all robots: with all keys it is less than a client reads
	MaxMembers     = 2000    // digests of one Members
)

// RobotName is the grammar of a robot's name, and of a key's id.
var (
	RobotName  = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$`)
	TokenKeyID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$`)
	RobotHash  = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

var digestKey = regexp.MustCompile(`^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$`)

// Members asks which of some blobs are members of a repository (POST members), and is the answer.
type Members struct {
	Digests []digest.Digest `json:"digests"`
}

// RepositoryPage is a page of repositories (GET /v2/_kraken/repositories/<digest>).
type RepositoryPage struct {
	Repositories []string `json:"repositories"`
}

// entryOf returns where an entry is that is about no repository; key is of the grammar.
func entryOf(resource, key string, grammar *regexp.Regexp) registry.Endpoint {
	if !grammar.MatchString(key) {
		return registry.NoEndpoint(fmt.Errorf("%w: %.80q is no name in %s", registry.ErrNameInvalid, key, resource))
	}
	return registry.ExtensionPath{Extension: ExtensionName, Resource: resource, Key: key}.Endpoint()
}

// Access returns the keys of tokens and the robots: have, of an answer before, where they have not changed since.
func (c *IndexClient) Access(ctx context.Context, have AccessState) (s AccessState, err error) {
	h := http.Header{}
	if have.ETag != "" {
		h.Set("If-None-Match", have.ETag)
	}
	resp, err := c.Do(ctx, registry.Request{Method: http.MethodGet, To: everywhere("access"), Header: h}, http.StatusOK, http.StatusNotModified)
	if err != nil {
		return AccessState{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNotModified && have.ETag != "" {
		return have, nil
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAccess)).Decode(&s); err != nil {
		return AccessState{}, fmt.Errorf("%w: keys and robots: answer: %w", registry.ErrUnavailable, err)
	}
	s.ETag = resp.Header.Get("ETag")
	return s, nil
}

// maxAccess bounds the bytes of an AccessState: it is more than all keys and robots can have.
const maxAccess = MaxRobotsSize + MaxTokenKeys*MaxAccessEntry + 1<<20

// PutTokenKey makes a key known to all proxies and agents.
func (c *IndexClient) PutTokenKey(ctx context.Context, k TokenKey) error {
	return c.putEntry(ctx, entryOf("tokenkeys", k.ID, TokenKeyID), k)
}

// PutRobot makes a robot, or changes it.
func (c *IndexClient) PutRobot(ctx context.Context, r Robot) error {
	return c.putEntry(ctx, entryOf("robots", r.Name, RobotName), r)
}

// DeleteRobot revokes a robot's key, registry.ErrNameUnknown when there is none of this name.
func (c *IndexClient) DeleteRobot(ctx context.Context, name string) error {
	_, err := c.Call(ctx, registry.Request{Method: http.MethodDelete, To: entryOf("robots", name, RobotName)}, http.StatusAccepted)
	return err
}

func (c *IndexClient) putEntry(ctx context.Context, to registry.Endpoint, v any) error {
	body, n, err := jsonBody(v)
	if err != nil {
		return err
	}
	_, err = c.Call(ctx, registry.Request{Method: http.MethodPut, To: to, Header: jsonType, Body: body, Length: n}, http.StatusCreated)
	return err
}

// Members returns which of some blobs, at most MaxMembers, are members of a repository.
func (c *IndexClient) Members(ctx context.Context, repo string, ds []digest.Digest) ([]digest.Digest, error) {
	var out Members
	err := post(ctx, c.Client, endpoint(repo, "members", ""), Members{ds}, &out)
	return out.Digests, err
}

// BlobRepositories returns up to n repositories after last, in order, that have a blob.
func (c *IndexClient) BlobRepositories(ctx context.Context, d digest.Digest, last string, n int) ([]string, error) {
	var out RepositoryPage
	q := url.Values{"n": {strconv.Itoa(n)}}
	if last != "" {
		q.Set("last", last)
	}
	_, err := c.CallJSON(ctx, registry.Request{Method: http.MethodGet, To: entryOf("repositories", d.String(), digestKey), Query: q}, &out, http.StatusOK)
	return out.Repositories, err
}
