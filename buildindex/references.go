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
		_, err := x.db.Layer(ctx, repo, d)
		if errors.Is(err, names.ErrNotFound) {
			missing = append(missing, "blob "+d.String())
		} else if err != nil {
			return fmt.Errorf("check references: %w", err)
		}
	}
	for _, d := range p.manifests {
		ok, err := x.hasManifest(ctx, repo, d)
		if err != nil {
			return fmt.Errorf("check references: %w", err)
		}
		if !ok {
			missing = append(missing, "manifest "+d.String())
		}
	}
	for _, d := range p.either {
		ok, err := x.hasManifest(ctx, repo, d)
		if err == nil && !ok {
			_, err = x.db.Layer(ctx, repo, d)
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
	return x.miss(registry.ErrManifestBlobUnknown, "repository %s lacks %s", repo, strings.Join(missing, ", "))
}
