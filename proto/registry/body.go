package registry

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync/atomic"
)

var (
	errBody     = &Error{"UNSUPPORTED", http.StatusBadRequest, "the request's body can't be read"}
	errBodySlow = &Error{"UNSUPPORTED", http.StatusRequestTimeout, "the request's body did not come in time"}
)

// requestBody is a request's body that remembers why it could not be read: broken chunks, or a connection that ended
// before it. Whoever reads sees the error as it is.
type requestBody struct {
	io.ReadCloser
	failed atomic.Pointer[error]
}

func (b *requestBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		b.failed.CompareAndSwap(nil, &err)
	}
	return n, err
}

// blame returns err, or the client's mistake in its place where err is the server's and the body could not be read:
// what then failed was the reading, and not the disk or the origins that the bytes go to.
func (b *requestBody) blame(err error) error {
	failed := b.failed.Load()
	if err == nil || failed == nil {
		return err
	}
	switch kind := KindOf(err); {
	case kind != ErrInternal && kind != ErrUnavailable:
		return err
	case errors.Is(*failed, os.ErrDeadlineExceeded):
		return fmt.Errorf("%w: %w", errBodySlow, *failed)
	}
	return fmt.Errorf("%w: %w", errBody, *failed)
}

// markBody puts a requestBody in the place of r's body.
func markBody(r *http.Request) *requestBody {
	b := &requestBody{ReadCloser: r.Body}
	if r.Body != nil && r.Body != http.NoBody {
		r.Body = b
	}
	return b
}
