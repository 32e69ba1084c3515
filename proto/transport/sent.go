package transport

import (
	"context"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

type connKey struct{}

// withConn lets AwaitSent find a request's connection.
func withConn(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, c)
}

// sentPoll is how often AwaitSent looks, at first and at most.
const sentPoll, sentPollMost = 100 * time.Microsecond, 4 * time.Millisecond

// AwaitSent waits until the kernel has sent what was written to the connection of the request whose context this is,
// until ctx is done, or until nothing more was sent for limit. The kernel takes megabytes for a slow link at once, so
// that the end of a write says little. It looks again and again (SIOCOUTQNSD of Linux, at most every 4 ms), for nothing
// reports it. A request that came another way is not waited for.
func AwaitSent(ctx context.Context, limit time.Duration) {
	c, _ := ctx.Value(connKey{}).(net.Conn)
	tc := tcpOf(c)
	if tc == nil {
		return
	}
	raw, err := tc.SyscallConn()
	if err != nil {
		return
	}
	end, before := time.Now().Add(limit), -1
	for pause := sentPoll; time.Now().Before(end); pause = min(2*pause, sentPollMost) {
		var left int
		var lerr error
		if err := raw.Control(func(fd uintptr) { left, lerr = unix.IoctlGetInt(int(fd), unix.SIOCOUTQNSD) }); err != nil || lerr != nil || left == 0 {
			return
		}
		if left != before {
			end, before = time.Now().Add(limit), left
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}
