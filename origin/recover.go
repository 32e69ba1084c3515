package origin

import (
	"context"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"

	"kraken/origin/store"
)

// errLost is the state of a debt whose bytes are nowhere to be found for now.
var errLost = errors.New("owed to the bucket, and its file is lost here")

// recover does what a debt needs whose bytes this disk has lost. Either every bucket that the debt names has the blob,
// so that it is settled, or the bytes come from another origin, and the debt goes on as any other. size is what the
// blob had, or store.SizeUnknown.
func (o *Origin) recover(ctx context.Context, d digest.Digest, m store.Marker, size int64) (settled bool, err error) {
	settled = true
	var errs []error
	for _, target := range m.Targets {
		done, err := o.payIfThere(ctx, d, m, target, size)
		settled = settled && done
		if err != nil {
			errs = append(errs, err)
		}
	}
	if settled {
		o.log.Warn("a blob that was owed to the bucket, and whose file was lost here, is in the bucket", "digest", d)
		return true, nil
	}
	if len(m.Repositories) == 0 {
		return false, errors.Join(append(errs, fmt.Errorf("marker of %s names no repository", d))...)
	}
	for _, or := range o.others(d) {
		err := o.copyWithDebt(ctx, or, m.Repositories[0], d, &m)
		if err == nil {
			o.log.Warn("a blob that is owed to the bucket, and whose file was lost here, came from another origin", "digest", d, "origin", or.ID)
			o.committed(d)
			return false, nil
		}
		errs = append(errs, err)
	}
	return false, fmt.Errorf("blob %s: %w: %w", d, errLost, errors.Join(errs...))
}
