package devcluster

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"kraken/proto/cluster"
)

// Owed returns how many blobs and names some origins and build-indexes, all when none is named, have not written to the
// bucket yet. A build-index that has not restored its names owes some, too.
func (cl *Cluster) Owed(ctx context.Context, of ...*Component) (int, error) {
	if len(of) == 0 {
		of = append(cl.Role("origin"), cl.Role("build-index")...)
	}
	sum := 0
	for _, c := range of {
		s, err := cl.writeback(ctx, c)
		if err != nil {
			return 0, err
		}
		sum += s.Pending + s.Names
	}
	return sum, nil
}

// writeback asks an origin or build-index what it has not written to the bucket.
func (cl *Cluster) writeback(ctx context.Context, c *Component) (s cluster.WritebackStatus, err error) {
	b, err := c.get(ctx, "http://"+c.Admin+"/writeback")
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err != nil {
		return s, fmt.Errorf("%s: %w", c.Name, err)
	}
	return s, nil
}

// Settle waits until nothing is owed, for at most limit. Its error says who owes what.
func (cl *Cluster) Settle(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		left, err := cl.Owed(ctx)
		if err == nil && left == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			if err == nil {
				err = fmt.Errorf("%d blobs and names are not in the bucket: %s", left, cl.owedBy(context.WithoutCancel(ctx)))
			}
			return fmt.Errorf("not within %s: %w", limit, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// owedBy is the state of write-back of all who have one.
func (cl *Cluster) owedBy(ctx context.Context) string {
	var out []string
	for _, c := range append(cl.Role("origin"), cl.Role("build-index")...) {
		s, err := cl.writeback(ctx, c)
		if err != nil {
			out = append(out, err.Error())
			continue
		}
		b, err := json.Marshal(s)
		if err != nil {
			b = []byte(err.Error())
		}
		out = append(out, c.Name+" "+string(b))
	}
	return strings.Join(out, "; ")
}
