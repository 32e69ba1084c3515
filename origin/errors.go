package origin

import (
	"errors"
	"fmt"

	"kraken/origin/store"
	"kraken/proto/registry"
)

// wire turns the store's errors into the registry's.
func wire(err error) error {
	var kind *registry.Error
	switch {
	case err == nil, errors.As(err, &kind):
		return err
	case errors.Is(err, store.ErrNotFound):
		kind = registry.ErrBlobUnknown
	case errors.Is(err, store.ErrDigestMismatch):
		kind = registry.ErrDigestInvalid
	case errors.Is(err, store.ErrSizeMismatch):
		kind = registry.ErrSizeInvalid
	case errors.Is(err, store.ErrUploadUnknown):
		kind = registry.ErrBlobUploadUnknown
	case errors.Is(err, store.ErrFull):
		kind = registry.ErrStorageFull
	case errors.Is(err, store.ErrBusy), errors.Is(err, store.ErrTooMany):
		kind = registry.ErrTooManyRequests
	case errors.Is(err, store.ErrMarked):
		kind = registry.ErrUnsupported
	default:
		return err
	}
	return fmt.Errorf("%w: %w", kind, err)
}
