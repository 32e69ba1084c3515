package upstream

import (
	"context"
	"net"
	"time"
)

// guardedDialer makes connections for the requests of one registry.
type guardedDialer struct {
	g        *guard
	registry string // host:port
}

// dial makes a connection to an address that the guard allows. Of a name's addresses those that it refuses are left
// out.
func (d guardedDialer) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	dialer := net.Dialer{KeepAlive: 15 * time.Second, Control: d.g.controlled(d.registry, addr)}
	return dialer.DialContext(ctx, network, addr)
}
