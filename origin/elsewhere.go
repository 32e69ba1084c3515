package origin

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// otherPatience is how long another origin may say nothing when it is asked what is on its disk. Whoever asks this
// origin waits for cluster.Stall at least, in which the bucket has to be asked as well.
const otherPatience = cluster.Stall / 2

// errNotAsked is why an origin that has not answered lately may have a blob.
var errNotAsked = errors.New("it has not answered lately and was not asked")

// elsewhere returns another origin, none of but, that has a blob on its disk, with its size, nil where none says so.
// unsure is why some may have it all the same: those that don't answer are not waited for, since the bucket, or whoever
// asks this origin, may do without them.
func (o *Origin) elsewhere(ctx context.Context, repo string, d digest.Digest, but ...string) (or *cluster.Origin, desc v1.Descriptor, unsure []error) {
	var asked []*cluster.Origin
	for _, or := range o.others(d) {
		switch {
		case slices.Contains(but, or.ID):
		case or.Answers():
			asked = append(asked, or)
		default:
			unsure = append(unsure, fmt.Errorf("origin %s: %w", or.ID, errNotAsked))
		}
	}
	out := cluster.Ask(ctx, o.origins, asked, 1, cluster.Question[v1.Descriptor]{Ask: func(ctx context.Context, or *cluster.Origin) (v1.Descriptor, error) {
		desc, err := or.LocalStat(transport.WithProgressTimeout(ctx, otherPatience), repo, d)
		return desc, o.heard(or, err)
	}})
	if len(out.Answers) > 0 {
		return out.Answers[0].From, out.Answers[0].Value, nil
	}
	for _, err := range out.Errs {
		if !errors.Is(err, registry.ErrBlobUnknown) {
			unsure = append(unsure, err)
		}
	}
	if out.Final != nil {
		unsure = append(unsure, out.Final)
	}
	return nil, desc, unsure
}

// openElsewhere opens a blob at another origin that has it on its disk. It returns nil where none could, and why some
// may have it all the same.
func (o *Origin) openElsewhere(ctx context.Context, repo string, d digest.Digest, hint registry.Range) (c *registry.Content, or *cluster.Origin, unsure []error) {
	var failed []string
	var why []error
	for {
		or, _, unsure = o.elsewhere(ctx, repo, d, failed...)
		if or == nil {
			return nil, nil, append(why, unsure...)
		}
		c, err := or.LocalOpen(transport.WithProgressTimeout(ctx, readStall), repo, d, hint)
		if err == nil {
			return c, or, nil
		}
		if err = o.heard(or, err); !errors.Is(err, registry.ErrBlobUnknown) { // its copy was rotten, or went just now
			why = append(why, err)
		}
		failed = append(failed, or.ID)
	}
}

// heard returns the error of another origin with its name, nil for nil. One that was silent is not asked again until it
// has answered.
func (o *Origin) heard(or *cluster.Origin, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, transport.ErrNoProgress) {
		o.origins.Suspect(or)
	}
	return fmt.Errorf("origin %s: %w", or.ID, err)
}
