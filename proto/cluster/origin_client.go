package cluster

import (
	"bufio"
	"context"
	"crypto/sha1"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/blob"
	"kraken/proto/registry"
)

// OriginClient speaks to one origin: the blob half of a registry, and what an origin offers beside it. It is safe for
// concurrent use.
type OriginClient struct{ *registry.Client }

// NewOriginClient returns a client of the origin at a URL without /v2/.
func NewOriginClient(base string, hc *http.Client) (*OriginClient, error) {
	return newOriginClient(base, hc, nil)
}

func newOriginClient(base string, hc *http.Client, reached func(bool)) (*OriginClient, error) {
	c, err := registry.NewClientWith(base, hc, registry.ClientOptions{Dialect: Dialect(), Reached: reached})
	if err != nil {
		return nil, err
	}
	return &OriginClient{c}, nil
}

// LocalStat returns the size of a blob on the origin's own disk, registry.ErrBlobUnknown when it is not there whole.
// The origin asks nobody else.
func (c *OriginClient) LocalStat(ctx context.Context, repo string, d digest.Digest) (v1.Descriptor, error) {
	return c.StatAt(ctx, about(repo, "blobs", d), d)
}

// LocalOpen opens a blob on the origin's own disk, as LocalStat.
func (c *OriginClient) LocalOpen(ctx context.Context, repo string, d digest.Digest, hint registry.Range) (*registry.Content, error) {
	return c.OpenAt(ctx, about(repo, "blobs", d), d, hint)
}

// Replicate gives the origin a copy of size bytes, which it verifies and keeps durably. With writeback it owes the
// bucket the blob too.
func (c *OriginClient) Replicate(ctx context.Context, repo string, d digest.Digest, size int64, writeback bool, r io.Reader) error {
	h := http.Header{"Content-Type": {"application/octet-stream"}}
	if writeback {
		h.Set(WritebackHeader, "true")
	}
	_, err := c.Call(ctx, registry.Request{Method: http.MethodPut, To: about(repo, "blobs", d), Header: h, Body: r, Length: size}, http.StatusOK, http.StatusCreated)
	return err
}

// Owes asks an origin whether it owes the bucket a blob: nil when it holds the blob whole and does,
// registry.ErrBlobUnknown when it does not, whatever else it has. An origin that does not know the question, of an
// older version, is registry.ErrUnsupported.
func (c *OriginClient) Owes(ctx context.Context, repo string, d digest.Digest) (Debt, error) {
	var out Debt
	_, err := c.CallJSON(ctx, registry.Request{Method: http.MethodGet, To: about(repo, "debt", d)}, &out, http.StatusOK)
	return out, err
}

// TakeDebt hands a debt over to an origin that holds the blob. When it returns nil the origin owes the blob, durably,
// for all repositories of the debt. registry.ErrBlobUnknown when the origin does not hold the blob: Replicate comes
// first.
func (c *OriginClient) TakeDebt(ctx context.Context, d digest.Digest, debt Debt) error {
	if len(debt.Repositories) == 0 {
		return fmt.Errorf("hand over the debt of %s: it names no repository", d)
	}
	for part := range slices.Chunk(debt.Repositories, MaxDebt) {
		in := debt
		in.Repositories = part
		body, n, err := jsonBody(in)
		if err != nil {
			return err
		}
		to := about(part[0], "debt", d)
		var out Debt
		if _, err := c.CallJSON(ctx, registry.Request{Method: http.MethodPut, To: to, Header: jsonType, Body: body, Length: n}, &out, http.StatusOK); err != nil {
			return err
		}
		for _, repo := range part {
			if !slices.Contains(out.Repositories, repo) {
				return fmt.Errorf("%w: hand over the debt of %s: the answer lacks repository %s", registry.ErrUnavailable, d, repo)
			}
		}
	}
	return nil
}

// Verify tells an origin that a reader got other bytes of a blob than its digest says: it reads the blob again soon,
// and drops a rotten one. registry.ErrBlobUnknown when the origin does not hold it.
func (c *OriginClient) Verify(ctx context.Context, repo string, d digest.Digest) error {
	_, err := c.Call(ctx, registry.Request{Method: http.MethodPost, To: about(repo, "verify", d)}, http.StatusAccepted)
	return err
}

// Metainfo returns a blob's metainfo. registry.ErrUnavailable, with a time to retry, while the origin computes it.
func (c *OriginClient) Metainfo(ctx context.Context, repo string, d digest.Digest) (*blob.Metainfo, error) {
	to := about(repo, "metainfo", d)
	resp, err := c.Do(ctx, registry.Request{Method: http.MethodGet, To: to}, http.StatusOK)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, MaxMetainfo+1))
	if err != nil {
		return nil, fmt.Errorf("%w: read metainfo of %s: %w", registry.ErrUnavailable, d, err)
	}
	m, err := blob.ParseMetainfo(b)
	if err == nil && m.Digest != d {
		err = fmt.Errorf("it is of %s", m.Digest)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: GET %s: %w", registry.ErrUnavailable, to, err)
	}
	return m, nil
}

// Arriving asks how far a blob is that this origin, or another one that it asks, fetches from a bucket or an upstream
// registry. Asking begins the fetch. registry.ErrBlobUnknown when the blob is nowhere.
func (c *OriginClient) Arriving(ctx context.Context, repo string, d digest.Digest, q ArrivingRequest) (Arriving, error) {
	v := url.Values{"from": {strconv.Itoa(q.From)}}
	if q.Wait {
		v.Set("wait", "true")
	}
	if q.Here {
		v.Set("here", "true")
	}
	var out Arriving
	to := about(repo, "arriving", d)
	_, err := c.CallJSON(ctx, registry.Request{Method: http.MethodGet, To: to, Query: v}, &out, http.StatusOK)
	if err == nil && (out.Size < 0 || out.Size > blob.MaxSize || out.From < 0 || len(out.Hashes)%sha1.Size != 0) {
		err = fmt.Errorf("%w: GET %s: it makes no sense", registry.ErrUnavailable, to)
	}
	return out, err
}

// DoubtOf is the query by which a POST to verify says what is doubted: nothing, the bytes, or DoubtMetainfo.
const (
	DoubtOf       = "of"
	DoubtMetainfo = "metainfo"
)

// VerifyMetainfo tells the origin that a blob's metainfo is doubted: it verifies the blob and computes the metainfo
// again. The old one is in use until another one comes out.
func (c *OriginClient) VerifyMetainfo(ctx context.Context, repo string, d digest.Digest) error {
	q := url.Values{DoubtOf: {DoubtMetainfo}}
	_, err := c.Call(ctx, registry.Request{Method: http.MethodPost, To: about(repo, "verify", d), Query: q}, http.StatusAccepted)
	return err
}

// Lease returns pieces that the origin promises to this agent, to be fetched now.
func (c *OriginClient) Lease(ctx context.Context, repo string, d digest.Digest, l LeaseRequest) (LeaseResponse, error) {
	var out LeaseResponse
	return out, post(ctx, c.Client, about(repo, "lease", d), l, &out)
}

// Durable returns which of the blobs are in the bucket of the repository, as far as the origin knows. At most
// MaxDurableDigests of them.
func (c *OriginClient) Durable(ctx context.Context, repo string, ds []digest.Digest) (DurableResponse, error) {
	var out DurableResponse
	return out, post(ctx, c.Client, endpoint(repo, "durable", ""), DurableRequest{ds}, &out)
}

// PutName makes the origin keep a record. It is durable when PutName returns nil, or the origin had a later one.
// registry.ErrHeld when the origin has given its lease to another than holder; an empty holder is not compared.
func (c *OriginClient) PutName(ctx context.Context, r NameRecord, holder string) error {
	body, n, err := jsonBody(r)
	if err != nil {
		return err
	}
	_, err = c.Call(ctx, registry.Request{Method: http.MethodPut, To: recordOf(r.Repository, NameKey(r)), Query: heldBy(holder), Header: jsonType, Body: body, Length: n}, http.StatusOK, http.StatusCreated)
	return err
}

// heldBy is the query by which a build-index says which it is.
func heldBy(holder string) url.Values {
	if holder == "" {
		return url.Values{}
	}
	return url.Values{"holder": {holder}}
}

// DeleteName makes the origin forget the record of a key, if it is of this generation or an older one. registry.ErrHeld
// as from PutName.
func (c *OriginClient) DeleteName(ctx context.Context, d NameDeletion, holder string) error {
	q := heldBy(holder)
	q.Set("generation", strconv.FormatInt(d.Generation, 10))
	if len(d.Signature) > 0 {
		q.Set("signature", base64.RawURLEncoding.EncodeToString(d.Signature))
	}
	_, err := c.Call(ctx, registry.Request{Method: http.MethodDelete, To: recordOf(d.Repository, d.Key), Query: q}, http.StatusAccepted)
	return err
}

// Hold asks the origin to let the caller be the only build-index for a while. The answer says who is.
func (c *OriginClient) Hold(ctx context.Context, h HolderRequest) (HolderResponse, error) {
	var out HolderResponse
	body, n, err := jsonBody(h)
	if err != nil {
		return out, err
	}
	_, err = c.CallJSON(ctx, registry.Request{Method: http.MethodPut, To: everywhere("holder"), Header: jsonType, Body: body, Length: n}, &out, http.StatusOK)
	return out, err
}

// Names calls fn with the JSON of every record that the origin keeps, unchecked: ParseNameRecord reads it. The bytes
// are fn's until it returns; an error of fn ends the list and is returned.
func (c *OriginClient) Names(ctx context.Context, fn func(line []byte) error) error {
	return lines(ctx, c, everywhere("names"), fn)
}

// Pending calls fn for every blob that the origin has not written back. An error of fn ends the list and is returned.
func (c *OriginClient) Pending(ctx context.Context, fn func(PendingBlob) error) error {
	to := everywhere("pending")
	return lines(ctx, c, to, func(line []byte) error {
		var p PendingBlob
		if err := json.Unmarshal(line, &p); err != nil {
			return fmt.Errorf("%w: GET %s: %w", registry.ErrUnavailable, to, err)
		}
		return fn(p)
	})
}

// lines calls fn with each line of an answer, newline-delimited JSON.
func lines(ctx context.Context, c *OriginClient, to registry.Endpoint, fn func(line []byte) error) error {
	resp, err := c.Do(ctx, registry.Request{Method: http.MethodGet, To: to}, http.StatusOK)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	sc := bufio.NewScanner(resp.Body)
	sc.Buffer(nil, 2*MaxNameRecord)
	for sc.Scan() {
		if err := fn(sc.Bytes()); err != nil {
			return err
		}
	}
	if err := sc.Err(); err != nil {
		return fmt.Errorf("%w: GET %s: %w", registry.ErrUnavailable, to, err)
	}
	return nil
}
