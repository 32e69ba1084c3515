package transport

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// On a short path the kernel's own send buffer grows to megabytes, and what is in it waits for a reader that is the slower side: it leaves
// the processor's caches meanwhile, and goes out in the bits that the reader's window opens by, each in an interrupt. A bounded one
// keeps the writer just ahead: sixteen pulls over loopback took a quarter less time. Longer paths need what the kernel finds out; 512 KiB
// over half a millisecond are still a gigabyte a second.
const (
	shortPath  = 500 * time.Microsecond
	shortQueue = 256 << 10 // the kernel doubles it, for its own bookkeeping (socket(7))
)

// shortQueues bounds the send buffers of connections over short paths.
type shortQueues struct{ net.Listener }

// Accept returns the connection as it is: sendfile needs a *net.TCPConn.
func (l shortQueues) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if tc, ok := c.(*net.TCPConn); err == nil && ok {
		// Without a bound it works as well.
		if rtt, rerr := roundTrip(tc); rerr == nil && rtt < shortPath {
			_ = tc.SetWriteBuffer(shortQueue)
		}
	}
	return c, err
}

// roundTrip is the round-trip time of the connection's handshake, or later: the kernel's smoothed one.
func roundTrip(c *net.TCPConn) (time.Duration, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var info *unix.TCPInfo
	cerr := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
	if cerr != nil {
		return 0, cerr
	}
	if err != nil {
		return 0, err
	}
	return time.Duration(info.Rtt) * time.Microsecond, nil
}
