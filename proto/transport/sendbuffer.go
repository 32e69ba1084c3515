package transport

import (
	"net"
	"net/http"
	"runtime"
	"sync"
	"time"
)

// On a short path the kernel's own send buffer grows to megabytes, and what is in it waits for a reader that is the
// slower side. Where more bodies are sent than there are processors it leaves the processors' caches meanwhile, and
// goes out in the bits that the reader's window opens by, each in an interrupt. A bounded one keeps the writer just
// ahead: sixteen pulls over loopback took a quarter less time. Few have nothing from it, and longer paths need what the
// kernel finds out; 512 KiB over half a millisecond are still a gigabyte a second.
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
	if tc := tcpOf(c); tc != nil {
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
