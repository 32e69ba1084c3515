package buildindex

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"kraken/buildindex/names"
	"kraken/proto/registry"
)

// checkReferences wants every blob and manifest that is referred to in the repository, and names all that are not.
func (x *Index) checkReferences(ctx context.Context, repo string, p *parsed) error {
	var missing []string
	for _, d := range p.blobs {
		_, err := x.layer(ctx, repo, d)
		if errors.Is(err, names.ErrNotFound) {
			missing = append(missing, "blob "+d.String())
		} else if err != nil {
			return fmt.Errorf("check references: %w", err)
		}
	}
	for _, d := range p.manifests {
		_, err := x.stat(ctx, repo, d)
		if errors.Is(err, names.ErrNotFound) {
			missing = append(missing, "manifest "+d.String())
		} else if err != nil {
			return fmt.Errorf("check references: %w", err)
		}
	}
	for _, d := range p.either {
		_, err := x.stat(ctx, repo, d)
		if errors.Is(err, names.ErrNotFound) {
			_, err = x.layer(ctx, repo, d)
		}
		if errors.Is(err, names.ErrNotFound) {
			missing = append(missing, d.String())
		} else if err != nil {
			return fmt.Errorf("check references: %w", err)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return fmt.Errorf("%w: repository %s lacks %s", registry.ErrManifestBlobUnknown, repo, strings.Join(missing, ", "))
}
