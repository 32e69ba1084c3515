package origin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"kraken/proto/registry"
)

const (
	// readStall is for how long a place may send nothing before the blob is asked for again at the byte that is
	// missing.
	readStall = 10 * time.Second
	// readTries is how often in a row a read may end without worthwhile bytes before the blob counts as not to be had.
	readTries, worthwhile = 5, 32 << 10
	// readPause is how long the first pause between two tries is; each is twice as long as the one before.
	readPause = 100 * time.Millisecond
)

// parts reads a blob from a place, in order. A body that breaks off, or hangs, is opened again at the byte that is
// missing. It never ends clean before all bytes were read, and verifies nothing. One goroutine reads.
type parts struct {
	ctx   context.Context
	from  blobSource
	size  int64
	stall time.Duration
	end   func() // nil, or to be called by Close
	ahead forerun

	pos   int64
	body  io.ReadCloser // nil: to be opened
	skip  int64         // bytes of it that are there already
	tries int           // in a row without worthwhile bytes
	got   int64         // since the last try began
	timer *time.Timer   // closes the body that hangs
	hung  atomic.Bool
}

func newParts(ctx context.Context, from blobSource, size int64) *parts {
	return &parts{ctx: ctx, from: from, size: size, stall: readStall}
}

// Read implements io.Reader. An error is final.
func (r *parts) Read(b []byte) (int, error) {
	for r.pos < r.size {
		r.ahead.look(r, time.Now())
		if n, ok, err := r.ahead.read(r, b); ok {
			r.pos += int64(n)
			return n, err
		}
		if r.body == nil {
			if err := r.open(); err != nil {
				if err := r.failed(err); err != nil {
					return 0, err
				}
				continue
			}
		}
		r.watch()
		n, err := r.body.Read(b[:min(int64(len(b)), r.ahead.limit(r)-r.pos+r.skip)])
		r.timer.Stop()
		if k := int(min(r.skip, int64(n))); k > 0 {
			r.skip -= int64(k)
			n = copy(b, b[k:n])
		}
		r.pos += int64(n)
		if r.got += int64(n); r.got >= worthwhile {
			r.tries = 0
		}
		if n > 0 {
			return n, nil // an error comes again
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			if r.hung.Load() {
				err = fmt.Errorf("nothing came for %s: %w", r.stall, err)
			}
			if err := r.failed(err); err != nil {
				return 0, err
			}
		}
	}
	return 0, io.EOF
}

// watch closes the body when a read takes too long.
func (r *parts) watch() {
	if r.timer != nil {
		r.timer.Reset(r.stall)
		return
	}
	body := r.body
	r.hung.Store(false)
	r.timer = time.AfterFunc(r.stall, func() {
		r.hung.Store(true)
		body.Close()
	})
}

// open asks for the bytes from pos on. Where ranges are ignored what is there already is read again.
func (r *parts) open() error {
	body, size, err := r.from.open(r.ctx, r.pos, -1)
	r.skip = 0
	if errors.Is(err, errNoRange) {
		r.skip, err = r.pos, nil
	}
	if err != nil {
		return err
	}
	if size != r.size {
		return errors.Join(fmt.Errorf("the blob has %d bytes now, and had %d", size, r.size), body.Close())
	}
	r.body, r.got = body, 0
	return nil
}

// failed ends a try. It returns an error when there is not to be another one.
func (r *parts) failed(err error) error {
	r.closeBody()
	if r.ctx.Err() != nil {
		return context.Cause(r.ctx)
	}
	if r.tries++; r.tries >= readTries || errors.Is(err, registry.ErrBlobUnknown) || errors.Is(err, registry.ErrDenied) || errors.Is(err, registry.ErrUnauthorized) {
		return fmt.Errorf("read at %d of %d bytes: %w", r.pos, r.size, err)
	}
	t := time.NewTimer(readPause << (r.tries - 1))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	}
}

// Close ends the reading.
func (r *parts) Close() error {
	err := r.closeBody()
	r.ahead.close()
	if r.end != nil {
		r.end()
	}
	return err
}

// closeBody ends the read under way.
func (r *parts) closeBody() error {
	if r.timer != nil {
		r.timer.Stop()
		r.timer = nil
	}
	if r.body == nil {
		return nil
	}
	body := r.body
	r.body = nil
	return body.Close()
}
