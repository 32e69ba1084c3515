package swarm

import (
	"fmt"
	"io"
	"os"
	"syscall"
)

// sendMore writes b and tells the kernel that more follows at once, so that it need not make a segment of it.
func sendMore(to syscall.RawConn, b []byte) error {
	var err error
	werr := to.Write(func(fd uintptr) bool {
		for len(b) > 0 {
			var n int
			if n, err = syscall.SendmsgN(int(fd), b, nil, nil, syscall.MSG_MORE|syscall.MSG_NOSIGNAL); err != nil {
				switch err {
				case syscall.EINTR:
					continue
				case syscall.EAGAIN:
					return false
				}
				err = os.NewSyscallError("sendmsg", err)
				return true
			}
			b = b[n:]
		}
		err = nil
		return true
	})
	if werr != nil {
		return werr
	}
	return err
}

// sendFile sends n bytes of f from off on without a copy of them in this process, sendfile(2). os.ErrClosed: f was closed before it
// began; later it does no harm. io.ErrUnexpectedEOF: the file ends before.
func sendFile(to syscall.RawConn, f *os.File, off, n int64) error {
	from, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var serr, werr error
	// Within Control the descriptor stays open, also when f is closed.
	err = from.Control(func(in uintptr) {
		werr = to.Write(func(out uintptr) bool {
			for n > 0 {
				var k int
				if k, serr = syscall.Sendfile(int(out), int(in), &off, int(n)); k > 0 {
					n -= int64(k)
				}
				switch {
				case serr == syscall.EAGAIN:
					return false
				case serr == syscall.EINTR:
				case serr != nil:
					serr = os.NewSyscallError("sendfile", serr)
					return true
				case k == 0:
					serr = fmt.Errorf("%w: %d bytes are missing", io.ErrUnexpectedEOF, n)
					return true
				}
			}
			serr = nil
			return true
		})
	})
	switch {
	case err != nil: // the one reason, as an error of the runtime's own
		return fmt.Errorf("%w: %w", os.ErrClosed, err)
	case werr != nil:
		return werr
	}
	return serr
}
