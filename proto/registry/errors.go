package registry

import (
	"errors"
	"fmt"
	"net/http"
	"time"
)

// Error is a kind of failure that both ends know: a code of the specification ("Error Codes") with its status.
// Wrap one with %w to say what was attempted; compare with errors.Is. The client turns a response back into the same
// value.
type Error struct {
	Code    string
	Status  int
	Message string // generic, used when nothing more specific is known
}

func (e *Error) Error() string { return e.Message }

// The one table from errors to statuses and codes.
var (
	ErrBlobUnknown         = &Error{"BLOB_UNKNOWN", http.StatusNotFound, "blob unknown to registry"}
	ErrBlobUploadInvalid   = &Error{"BLOB_UPLOAD_INVALID", http.StatusBadRequest, "blob upload invalid"}
	ErrBlobUploadUnknown   = &Error{"BLOB_UPLOAD_UNKNOWN", http.StatusNotFound, "blob upload unknown to registry"}
	ErrRangeInvalid        = &Error{"BLOB_UPLOAD_INVALID", http.StatusRequestedRangeNotSatisfiable, "chunk is out of order"}
	ErrRangeNotSatisfiable = &Error{"RANGE_INVALID", http.StatusRequestedRangeNotSatisfiable, "the blob does not have this range"}
	ErrDigestInvalid       = &Error{"DIGEST_INVALID", http.StatusBadRequest, "digest is malformed or does not match the content"}
	ErrManifestBlobUnknown = &Error{"MANIFEST_BLOB_UNKNOWN", http.StatusNotFound, "manifest references content unknown to the repository"}
	ErrManifestInvalid     = &Error{"MANIFEST_INVALID", http.StatusBadRequest, "manifest invalid"}
	ErrManifestTooLarge    = &Error{"MANIFEST_INVALID", http.StatusRequestEntityTooLarge, "manifest is larger than 4 MiB"}
	ErrManifestUnknown     = &Error{"MANIFEST_UNKNOWN", http.StatusNotFound, "manifest unknown to registry"}
	ErrNameInvalid         = &Error{"NAME_INVALID", http.StatusBadRequest, "invalid repository name"}
	ErrTagInvalid          = &Error{"MANIFEST_INVALID", http.StatusBadRequest, "invalid tag"}
	ErrTooManyTags         = &Error{"MANIFEST_INVALID", http.StatusRequestURITooLong, "too many tag parameters"}
	ErrNameUnknown         = &Error{"NAME_UNKNOWN", http.StatusNotFound, "repository name not known to registry"}
	ErrSizeInvalid         = &Error{"SIZE_INVALID", http.StatusBadRequest, "length does not match the content"}
	ErrPaginationInvalid   = &Error{"PAGINATION_NUMBER_INVALID", http.StatusBadRequest, "invalid number of results requested"}
	ErrRecordInvalid       = &Error{"RECORD_INVALID", http.StatusBadRequest, "name record is not valid"}
	ErrUnauthorized        = &Error{"UNAUTHORIZED", http.StatusUnauthorized, "authentication required"}
	ErrDenied              = &Error{"DENIED", http.StatusForbidden, "requested access to the resource is denied"}
	ErrUnsupported         = &Error{"UNSUPPORTED", http.StatusMethodNotAllowed, "the operation is unsupported"}
	ErrPrecondition        = &Error{"PRECONDITION_FAILED", http.StatusPreconditionFailed, "the tag is not what the request expects it to be"}
	ErrTooManyRequests     = &Error{"TOOMANYREQUESTS", http.StatusTooManyRequests, "too many requests"}
	ErrUnavailable         = &Error{"UNAVAILABLE", http.StatusServiceUnavailable, "not reachable now, try again"}
	ErrTooFewCopies        = &Error{"TOO_FEW_COPIES", http.StatusGatewayTimeout, "not kept in enough places yet; it may take effect, try again"}
	ErrHeld                = &Error{"HELD", http.StatusLocked, "another build-index holds the origins"}
	ErrStorageFull         = &Error{"INSUFFICIENT_STORAGE", http.StatusInsufficientStorage, "no space left for this content"}
	ErrInternal            = &Error{"UNKNOWN", http.StatusInternalServerError, "internal error"}
)

// table holds every Error in the order in which the client matches a response: code and status first, then status
// alone.
var table = []*Error{
	ErrBlobUnknown, ErrBlobUploadInvalid, ErrBlobUploadUnknown, ErrRangeInvalid, ErrRangeNotSatisfiable, ErrDigestInvalid, ErrManifestBlobUnknown,
	ErrManifestInvalid, ErrManifestTooLarge, ErrManifestUnknown, ErrNameInvalid, ErrTooManyTags, ErrNameUnknown, ErrSizeInvalid,
	ErrPaginationInvalid, ErrUnauthorized, ErrDenied, ErrUnsupported, ErrPrecondition, ErrTooManyRequests, ErrUnavailable,
	ErrStorageFull, ErrInternal, ErrRecordInvalid, ErrTooFewCopies, ErrHeld,
}

// RangeError is a chunk that does not start where the session stands. It is an ErrRangeInvalid; the answer is 416 with
// the session's Location and Range.
type RangeError struct {
	Upload Upload
	Got    int64 // where the chunk started
}

func (e *RangeError) Error() string {
	return fmt.Sprintf("chunk starts at byte %d, the upload stands at byte %d", e.Got, e.Upload.Offset)
}

// Unwrap makes errors.Is(err, ErrRangeInvalid) true.
func (e *RangeError) Unwrap() error { return ErrRangeInvalid }

// RetryError is an error with the time after which another try is worth while, sent as Retry-After.
type RetryError struct {
	Err   error
	After time.Duration
	// Expected says that this is how things go, and no trouble that the log has to tell of.
	Expected bool
	// Away says that the server itself is away for a moment, and not what it would have asked: whoever has patience
	// with it asks again. Sent as Dialect.Away.
	Away bool
}

func (e *RetryError) Error() string { return e.Err.Error() }

// Unwrap returns Err.
func (e *RetryError) Unwrap() error { return e.Err }

// KindOf returns the table's entry that err wraps, ErrInternal when there is none: then it is the server's fault.
func KindOf(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return ErrInternal
}
