package swarm

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"
)

// addresses gives every peer an address of its own. The library bans by IP address, and behind one IP there may be many peers:
// all of a test machine's, or several nodes behind one NAT. So the library only ever sees a stand-in: a unique local IPv6
// address (RFC 4193) made of a hash of the real ip:port. Its bans then hit one peer, and are read back from there.
type addresses struct {
	m  *metrics
	mu sync.Mutex
	// by the stand-in's text, with port
	real   map[string]netip.AddrPort // peers that may be dialled
	conns  map[string]*conn
	ids    map[netip.Addr][20]byte // who was behind a stand-in
	addrs  map[netip.Addr]string   // the real address, for people
	bans   map[[20]byte]Ban
	proven map[[20]byte]bool // peers that have sent a piece that was right
}

// maxAddresses bounds what is remembered; the oldest knowledge goes as a whole, it is only needed to dial and to name.
const maxAddresses = 100_000

func newAddresses(m *metrics) *addresses {
	return &addresses{
		m: m, real: map[string]netip.AddrPort{}, conns: map[string]*conn{}, ids: map[netip.Addr][20]byte{},
		addrs: map[netip.Addr]string{}, bans: map[[20]byte]Ban{}, proven: map[[20]byte]bool{},
	}
}

// standIn is the address that the library sees for a real one.
func standIn(real netip.AddrPort) netip.AddrPort {
	sum := sha256.Sum256([]byte(real.String()))
	var b [16]byte
	b[0] = 0xfd
	copy(b[1:], sum[:15])
	return netip.AddrPortFrom(netip.AddrFrom16(b), real.Port())
}

// know makes a peer's address dialable and returns its stand-in.
func (a *addresses) know(real netip.AddrPort) netip.AddrPort {
	s := standIn(real)
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.real) >= maxAddresses {
		clear(a.real)
	}
	if len(a.addrs) >= maxAddresses {
		clear(a.addrs)
		clear(a.ids)
	}
	a.real[s.String()] = real
	a.addrs[s.Addr()] = real.String()
	return s
}

func (a *addresses) wrap(c net.Conn) (net.Conn, error) {
	real, err := netip.ParseAddrPort(c.RemoteAddr().String())
	if err != nil {
		return nil, fmt.Errorf("remote address: %w", err)
	}
	s := a.know(netip.AddrPortFrom(real.Addr().Unmap(), real.Port()))
	w := &conn{Conn: c, a: a, remote: net.TCPAddrFromAddrPort(s), key: s.String()}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.conns[w.key] = w
	return w, nil
}

// identify notes who is behind a stand-in.
func (a *addresses) identify(remote string, id [20]byte) {
	ap, err := netip.ParseAddrPort(remote)
	if err != nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ids[ap.Addr()] = id
}

// cut closes a connection by the stand-in of its other end.
func (a *addresses) cut(remote string) {
	a.mu.Lock()
	c := a.conns[remote]
	a.mu.Unlock()
	if c != nil {
		c.Close()
	}
}

// ban refuses the peers behind stand-ins that the library has banned, by id and by address, and returns how many are new.
func (a *addresses) ban(standIns []string) (fresh []Ban) {
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, s := range standIns {
		ip, err := netip.ParseAddr(s)
		if err != nil {
			continue
		}
		id, ok := a.ids[ip]
		if !ok {
			continue
		}
		if _, again := a.bans[id]; again {
			continue
		}
		b := Ban{ID: idString(id), Addr: a.addrs[ip], Until: now.Add(banFor)}
		a.bans[id] = b
		fresh = append(fresh, b)
	}
	return fresh
}

// banID refuses a peer and cuts its connections.
func (a *addresses) banID(id [20]byte) []Ban {
	var ips []string
	var cut []*conn
	a.mu.Lock()
	for ip, other := range a.ids {
		if other == id {
			ips = append(ips, ip.String())
		}
	}
	for _, c := range a.conns {
		if ap, err := netip.ParseAddrPort(c.key); err == nil && a.ids[ap.Addr()] == id {
			cut = append(cut, c)
		}
	}
	a.mu.Unlock()
	fresh := a.ban(ips)
	for _, c := range cut {
		c.Close()
	}
	return fresh
}

// trust says that a peer has sent a piece that was right.
func (a *addresses) trust(id [20]byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.proven) >= maxAddresses {
		clear(a.proven)
	}
	a.proven[id] = true
}

func (a *addresses) trusted(id [20]byte) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.proven[id]
}

func (a *addresses) banned(id [20]byte) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	b, ok := a.bans[id]
	if ok && time.Now().After(b.Until) {
		delete(a.bans, id)
		return false
	}
	return ok
}

func (a *addresses) list() []Ban {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []Ban
	for _, b := range a.bans {
		out = append(out, b)
	}
	return out
}

// conn is a connection whose other end has a stand-in's address. It counts what moves.
type conn struct {
	net.Conn
	a      *addresses
	remote net.Addr
	key    string
	once   sync.Once
}

func (c *conn) RemoteAddr() net.Addr { return c.remote }

func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.a.m.received.Add(float64(n))
	return n, err
}

func (c *conn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.a.m.sent.Add(float64(n))
	return n, err
}

func (c *conn) Close() error {
	c.once.Do(func() {
		c.a.mu.Lock()
		defer c.a.mu.Unlock()
		if c.a.conns[c.key] == c {
			delete(c.a.conns, c.key)
		}
	})
	return c.Conn.Close()
}

type listener struct {
	net.Listener
	a *addresses
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if w, err := l.a.wrap(c); err == nil {
			return w, nil
		}
		c.Close()
	}
}

// dialer turns stand-ins back into real addresses.
type dialer struct{ a *addresses }

func (d *dialer) DialerNetwork() string { return "tcp" }

func (d *dialer) Dial(ctx context.Context, addr string) (net.Conn, error) {
	d.a.mu.Lock()
	real, ok := d.a.real[addr]
	d.a.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("dial %s: not a known peer", addr)
	}
	var nd net.Dialer
	c, err := nd.DialContext(ctx, "tcp", real.String())
	if err != nil {
		return nil, err
	}
	return d.a.wrap(c)
}
