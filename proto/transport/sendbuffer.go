package transport

import (
	"errors"
	"net"
	"net/http"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// On a short path the kernel's own send buffer grows to megabytes, and what is in it waits for a reader that is the slower side. Where
// more bodies are sent than there are processors it leaves the processors' caches meanwhile, and goes out in the bits that the reader's
// window opens by, each in an interrupt. A bounded one keeps the writer just ahead: sixteen pulls over loopback took a quarter less
// time. Few have nothing from it, and longer paths need what the kernel finds out; 512 KiB over half a millisecond are still a
// gigabyte a second.
const (
	shortPath  = 500 * time.Microsecond
	shortQueue = 256 << 10 // the kernel doubles it, for its own bookkeeping (socket(7))
)

// crowd bounds the send buffers of connections over short paths that serve a request while more than few others do.
type crowd struct {
	few int

	mu     sync.Mutex
	active map[net.Conn]bool     // whether a request is being served
	now    int                   // how many are
	short  map[net.Conn]struct{} // bounded, which lasts as long as the connection
}

func newCrowd() *crowd {
	return &crowd{few: runtime.GOMAXPROCS(0), active: map[net.Conn]bool{}, short: map[net.Conn]struct{}{}}
}

// connState is http.Server's.
func (x *crowd) connState(c net.Conn, s http.ConnState) {
	if x.note(c, s) {
		boundSendBuffer(c)
	}
}

// note says whether the connection's buffer is to be bounded now.
func (x *crowd) note(c net.Conn, s http.ConnState) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.active[c] {
		x.now--
	}
	x.active[c] = s == http.StateActive
	switch s {
	case http.StateActive:
		x.now++
		if _, done := x.short[c]; !done && x.now > x.few {
			x.short[c] = struct{}{}
			return true
		}
	case http.StateClosed, http.StateHijacked:
		delete(x.active, c)
		delete(x.short, c)
	}
	return false
}

// boundSendBuffer bounds the send buffer of a connection over a short path. Without a bound it works as well.
func boundSendBuffer(c net.Conn) {
	if t, ok := c.(interface{ NetConn() net.Conn }); ok { // TLS
		c = t.NetConn()
	}
	if tc, ok := c.(*net.TCPConn); ok {
		if rtt, err := roundTrip(tc); err == nil && rtt < shortPath {
			_ = tc.SetWriteBuffer(shortQueue)
		}
	}
}

// roundTrip is the kernel's smoothed round-trip time of a connection.
func roundTrip(c *net.TCPConn) (time.Duration, error) {
	info, err := tcpInfo(c)
	if err != nil {
		return 0, err
	}
	return time.Duration(info.Rtt) * time.Microsecond, nil
}

// MinRoundTrip is the shortest round-trip time of late that the kernel has seen on a connection: what the path takes when nothing queues.
// It is 0 as long as nothing was acknowledged.
func MinRoundTrip(c *net.TCPConn) (time.Duration, error) {
	info, err := tcpInfo(c)
	const none = 1<<32 - 1
	if err != nil || info.Min_rtt == none {
		return 0, err
	}
	return time.Duration(info.Min_rtt) * time.Microsecond, nil
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
