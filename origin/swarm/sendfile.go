package swarm

import (
	"errors"
	"fmt"
	"io"
	"net"
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

// sendFile sends n bytes of f from off on without a copy of them in this process, sendfile(2), and says how many it
// sent. os.ErrClosed: f was closed before it began; later it does no harm. io.ErrUnexpectedEOF: the file ends before.
// errors.ErrUnsupported: the kernel can't do it with this file.
func sendFile(to syscall.RawConn, f *os.File, off, n int64) (sent int64, err error) {
	from, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var serr, werr error
	// Within Control the descriptor stays open, also when f is closed.
	err = from.Control(func(in uintptr) {
		werr = to.Write(func(out uintptr) bool {
			for sent < n {
				var k int
				if k, serr = syscall.Sendfile(int(out), int(in), &off, int(n-sent)); k > 0 {
					sent += int64(k)
				}
				switch {
				case serr == syscall.EAGAIN:
					return false
				case serr == syscall.EINTR:
				case sent == 0 && (serr == syscall.EINVAL || serr == syscall.ENOSYS || serr == syscall.EOPNOTSUPP):
					serr = fmt.Errorf("%w: sendfile: %w", errors.ErrUnsupported, serr)
					return true
				case serr != nil:
					serr = os.NewSyscallError("sendfile", serr)
					return true
				case k == 0:
					serr = fmt.Errorf("%w: %d bytes are missing", io.ErrUnexpectedEOF, n-sent)
					return true
				}
			}
			serr = nil
			return true
		})
	})
	switch {
	case err != nil: // Control fails for no other reason, with an error of the runtime's own
		return 0, fmt.Errorf("%w: %w", os.ErrClosed, err)
	case werr != nil:
		return sent, werr
	}
	return sent, serr
}

// sendOpen sends n bytes from the file that open names, by sendfile where the kernel can do it, and goes on with the
// next file when that one was closed before it began. copied writes what is copied.
func sendOpen(to syscall.RawConn, copied io.Writer, open func() *os.File, off, n int64) error {
	for before := (*os.File)(nil); ; {
		f := open()
		if f == nil || f == before {
			return os.ErrClosed
		}
		_, err := sendFile(to, f, off, n)
		if errors.Is(err, errors.ErrUnsupported) {
			err = copyFile(copied, f, off, n)
		}
		if !errors.Is(err, os.ErrClosed) {
			return err
		}
		before = f
	}
}

// copyFile does what sendFile does with reads and writes, for files and kernels that know no better.
func copyFile(to io.Writer, f *os.File, off, n int64) error {
	buf := hashBuffers.Get().(*[]byte)
	defer hashBuffers.Put(buf)
	for n > 0 {
		k, err := f.ReadAt((*buf)[:min(n, int64(len(*buf)))], off)
		if k == 0 && err != nil {
			if err == io.EOF {
				err = fmt.Errorf("%w: %d bytes are missing", io.ErrUnexpectedEOF, n)
			}
			return err
		}
		if _, err := to.Write((*buf)[:k]); err != nil {
			return err
		}
		off, n = off+int64(k), n-int64(k)
	}
	return nil
}

// ofPeer reports whether an error of sending is the connection's, and not the file's.
func ofPeer(err error) bool {
	for _, e := range []error{net.ErrClosed, errGone, syscall.EPIPE, syscall.ECONNRESET, syscall.ECONNABORTED, syscall.ETIMEDOUT, syscall.ENOTCONN,
		syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.ENETDOWN, os.ErrDeadlineExceeded} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
