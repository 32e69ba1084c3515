package upstream

import (
	"context"
	"net"
	"time"
)

// guardedDialer makes connections for the requests of one registry, by one of its endpoints. Others know nothing of
// where it was reached, be they at the same host.
type guardedDialer struct {
	g        *guard
	registry string // host:port
	inside   bool   // it was reached at a private address, the last time; under g.mu
}

// dial makes a connection to an address that the guard allows. Of a name's addresses those that it refuses are left
// out.
func (d *guardedDialer) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	dialer := net.Dialer{KeepAlive: 15 * time.Second, Control: d.controlled(addr)}
	return dialer.DialContext(ctx, network, addr)
}
