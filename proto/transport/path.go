package transport

import (
	"errors"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Path is what the kernel knows of the way between the two ends of a connection.
type Path struct {
	// RoundTrip is the shortest of late. Of a connection that was just made it is the handshake's, which may have
	// waited in queues.
	RoundTrip time.Duration
	// Segment is how many bytes of data one segment carries, in the direction that carries less.
	Segment int
}

// PathOf is the path of a connection; false as long as no round trip was measured.
func PathOf(c *net.TCPConn) (Path, bool) {
	info, err := tcpInfo(c)
	const none = 1<<32 - 1
	if err != nil || info.Min_rtt == none || info.Min_rtt == 0 {
		return Path{}, false
	}
	return Path{time.Duration(info.Min_rtt) * time.Microsecond, int(min(info.Snd_mss, info.Advmss))}, true
}

// SetReceiveWindow bounds how many bytes the other end may have on the way to this one, which the kernel otherwise
// finds out by itself and never does again on this connection. What it was allowed before it may still send.
func SetReceiveWindow(c *net.TCPConn, n int) error {
	// twice as much, of which half is for the kernel's bookkeeping (socket(7))
	if err := c.SetReadBuffer(n); err != nil {
		return err
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	// A larger buffer alone would not raise a window that was smaller once.
	cerr := raw.Control(func(fd uintptr) {
		err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_WINDOW_CLAMP, n)
	})
	return errors.Join(cerr, err)
}

// tcpInfo is what the kernel knows of a connection (TCP_INFO of tcp(7)).
func tcpInfo(c *net.TCPConn) (info *unix.TCPInfo, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	cerr := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
	return info, errors.Join(cerr, err)
}

// tcpOf is the TCP connection below c, which may speak TLS; nil when there is none.
func tcpOf(c net.Conn) *net.TCPConn {
	if t, ok := c.(interface{ NetConn() net.Conn }); ok {
		c = t.NetConn()
	}
	tc, _ := c.(*net.TCPConn)
	return tc
}
