package transport

import (
	"context"
	"net"
	"net/netip"
	"sync/atomic"
	"time"
)

// unboundFor is how long connections are made without the wanted address after one could be made only so.
const unboundFor = time.Minute

// boundDialer makes connections from one address of this machine, so that the other end knows the caller by it. Where
// that does not work, because the address is no address of this machine, or has no way there, it makes them from any.
type boundDialer struct {
	net.Dialer
	from    netip.Addr
	unbound atomic.Int64 // until when nothing is bound, in nanoseconds of Unix time
}

// DialContext gives the attempt from the address half of the dialer's time.
func (d *boundDialer) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	if time.Now().UnixNano() < d.unbound.Load() {
		return d.Dialer.DialContext(ctx, network, addr)
	}
	b := d.Dialer
	b.LocalAddr = &net.TCPAddr{IP: d.from.AsSlice()}
	b.Timeout = d.Timeout / 2
	if c, err := b.DialContext(ctx, network, addr); err == nil {
		return c, nil
	}
	c, err := d.Dialer.DialContext(ctx, network, addr)
	if err == nil {
		d.unbound.Store(time.Now().Add(unboundFor).UnixNano())
	}
	return c, err
}
