package agent

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/origin/swarm"
	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// leaseSource is one origin as a swarm.Source of one repository: an agent leases from it the pieces that nobody has
// yet.
type leaseSource struct {
	origin *cluster.Origin
	repo   string
	peer   [20]byte
	bytes  prometheus.Counter
	swarm  *swarm.Swarm // whose rates it keeps to
	tell   func(repo string, d digest.Digest, origins ...string)
	only   bool // the blob is leased from no other origin
}

// Name implements swarm.Source: it is the origin's id.
func (l *leaseSource) Name() string { return l.origin.ID }

// Lease implements swarm.Source: it asks the origin which pieces to fetch from it now.
func (l *leaseSource) Lease(ctx context.Context, m *blob.Metainfo, r swarm.LeaseRequest) ([]int, time.Duration, error) {
	resp, err := l.origin.Lease(ctx, l.repo, m.Digest, cluster.LeaseRequest{
		Peer: hex.EncodeToString(l.peer[:]), Have: r.Have.Bytes(), Want: r.Want, Max: r.Max, Alone: r.Alone, Stalled: r.Stalled, Only: l.only,
	})
	var later *registry.RetryError
	switch {
	case err == nil && resp.HeldBack:
		return nil, resp.RetryAfter, fmt.Errorf("lease pieces of %s from %s: %w", m.Digest, l.origin.ID, swarm.ErrHeldBack)
	case err == nil:
		return resp.Pieces, resp.RetryAfter, nil
	case errors.Is(err, registry.ErrTooManyRequests):
		if errors.As(err, &later) {
			return nil, later.After, nil
		}
		return nil, time.Second, nil
	case errors.Is(err, registry.ErrBlobUnknown):
		err = fmt.Errorf("%w: %w", swarm.ErrNotLeased, err)
	}
	return nil, 0, fmt.Errorf("lease pieces of %s from %s: %w", m.Digest, l.origin.ID, err)
}

// Wrong implements swarm.Doubted.
func (l *leaseSource) Wrong(d digest.Digest) { l.tell(l.repo, d, l.origin.ID) }

// ReadRange implements swarm.Source: the body of n bytes at off keeps to the download rates and is counted.
func (l *leaseSource) ReadRange(ctx context.Context, m *blob.Metainfo, off, n int64) (io.ReadCloser, error) {
	c, err := l.origin.OpenBlob(cluster.WithPeer(ctx, hex.EncodeToString(l.peer[:])), l.repo, m.Digest, registry.Range{Offset: off, Length: n})
	if err != nil {
		return nil, fmt.Errorf("read %d bytes at %d of %s from %s: %w", n, off, m.Digest, l.origin.ID, err)
	}
	if c.Size != m.Size {
		l.Wrong(m.Digest)
		c.Close()
		return nil, fmt.Errorf("read %s from %s: it has %d bytes, the metainfo says %d", m.Digest, l.origin.ID, c.Size, m.Size)
	}
	if _, err := c.Body.Seek(off, io.SeekStart); err != nil {
		c.Close()
		return nil, err
	}
	return &ranged{l.swarm.LimitDownload(ctx, m.Digest, io.LimitReader(c.Body, n)), l.bytes, c.Close}, nil
}

// ranged counts in bytes what is read of a range.
type ranged struct {
	r     io.Reader
	bytes prometheus.Counter
	close func() error
}

func (r *ranged) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.bytes.Add(float64(n))
	return n, err
}

func (r *ranged) Close() error { return r.close() }
