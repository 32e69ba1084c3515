package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// network is TCP in memory: hosts with addresses, listeners and connections whose bytes take time, which is virtual. A
// host may be frozen (a process that was stopped), gone (a machine that vanished without a word), or apart from
// another.
type network struct {
	mu    sync.Mutex
	rnd   *rand.Rand
	hosts map[string]*host
	moved map[string]*host   // where connections to an address lead that is no machine's own, by the name of who connects
	apart map[[2]string]bool // pairs of names, the smaller one first
	late  float64            // share of segments that are lost once and sent again
	twice float64            // share of connection attempts that arrive twice
}

func newNetwork(seed uint64) *network {
	return &network{rnd: rand.New(rand.NewPCG(seed, 1)), hosts: map[string]*host{}, moved: map[string]*host{}, apart: map[[2]string]bool{}}
}

// host is one machine.
type host struct {
	n    *network
	name string
	ip   net.IP

	// All below is guarded by n.mu.
	boot      int // incarnations of its process so far
	frozen    bool
	gone      bool
	thawed    *sync.Cond
	ports     int
	listeners map[int]*listener
	conns     map[*conn]struct{}
}

func (n *network) addHost(name string) *host {
	n.mu.Lock()
	defer n.mu.Unlock()
	h := &host{n: n, name: name, ip: net.IPv4(10, 0, byte(len(n.hosts)>>8), byte(len(n.hosts)+1)), thawed: sync.NewCond(&n.mu), ports: 30000,
		listeners: map[int]*listener{}, conns: map[*conn]struct{}{}}
	n.hosts[h.ip.String()] = h
	return h
}

// addr is where the host's process listens.
func (h *host) addr() string { return net.JoinHostPort(h.ip.String(), "80") }

// process is one incarnation of a host's process. What it has open ends with it.
type process struct {
	h    *host
	boot int
	dead chan struct{}
}

var errDead = errors.New("the process was killed")

// start begins an incarnation. The one before must have ended.
func (h *host) start() *process {
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	h.boot++
	h.frozen, h.gone = false, false
	for _, l := range h.listeners {
		l.closed = true
		l.cond.Broadcast()
	}
	h.listeners = map[int]*listener{}
	for c := range h.conns { // of a machine that vanished: now it answers what it does not know by a reset
		delete(h.conns, c)
		c.peer.stale = true
		c.wake()
		c.peer.wake()
	}
	h.wake()
	return &process{h, h.boot, make(chan struct{})}
}

// alive is under n.mu.
func (p *process) alive() bool {
	select {
	case <-p.dead:
		return false
	default:
		return p.boot == p.h.boot
	}
}

// gate waits while the process is frozen, and fails once it is dead.
func (p *process) gate() error {
	n := p.h.n
	n.mu.Lock()
	defer n.mu.Unlock()
	for p.alive() && p.h.frozen {
		p.h.thawed.Wait()
	}
	if !p.alive() {
		return errDead
	}
	return nil
}

// sleep lets virtual time pass for a step of the process, and fails once it is dead.
func (p *process) sleep(ctx context.Context, d time.Duration) error {
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
		case <-p.dead:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return p.gate()
}

// kill ends the process. With vanish nobody is told; else its connections are reset.
func (p *process) kill(vanish bool) {
	n := p.h.n
	n.mu.Lock()
	defer n.mu.Unlock()
	if !p.alive() {
		return
	}
	close(p.dead)
	p.h.gone = vanish
	for _, l := range p.h.listeners {
		l.closed = true
		l.cond.Broadcast()
	}
	for c := range p.h.conns {
		if vanish {
			c.err = syscall.ECONNRESET // of the dead side only
			c.wake()
			continue
		}
		c.reset()
	}
	p.h.wake()
}

func (n *network) freeze(h *host, frozen bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	h.frozen = frozen
	h.wake()
}

// wake lets everybody look again who waits for this host. n.mu is held.
func (h *host) wake() {
	h.thawed.Broadcast()
	for _, l := range h.listeners {
		l.cond.Broadcast()
	}
	for c := range h.conns {
		c.wake()
		c.peer.wake()
	}
}

func pair(a, b *host) [2]string {
	if a.name > b.name {
		a, b = b, a
	}
	return [2]string{a.name, b.name}
}

// part cuts the network between two hosts, or mends it. Nothing is lost: TCP sends it again later.
func (n *network) part(a, b *host, apart bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.apart, pair(a, b))
	if apart {
		n.apart[pair(a, b)] = true
	}
	a.wake()
	b.wake()
}

// open says that bytes go from one host to the other now. n.mu is held.
func (n *network) open(a, b *host) bool {
	return !a.gone && !b.gone && !n.apart[pair(a, b)]
}

// cut ends about one in every `in` connections of a host: by a reset, or by an end of both directions, as a load
// balancer does that is restarted.
func (n *network) cut(h *host, in int, fin bool) (cut int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for c := range h.conns {
		if n.rnd.IntN(in) != 0 {
			continue
		}
		cut++
		if fin {
			c.finish()
			c.peer.finish()
		} else {
			c.reset()
		}
	}
	return cut
}

// delay is how long a segment is on its way. n.mu is held.
func (n *network) delay() time.Duration {
	d := time.Duration(50+n.rnd.IntN(450)) * time.Microsecond
	if n.late > 0 && n.rnd.Float64() < n.late {
		d += time.Duration(200+n.rnd.IntN(800)) * time.Millisecond
	}
	return d
}

// listen is role.Deps.Listen.
func (p *process) listen(_ context.Context, network, addr string) (net.Listener, error) {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	k, err := strconv.Atoi(port)
	if err != nil {
		return nil, err
	}
	n := p.h.n
	n.mu.Lock()
	defer n.mu.Unlock()
	if !p.alive() {
		return nil, errDead
	}
	if p.h.listeners[k] != nil {
		return nil, fmt.Errorf("listen %s %s: %w", network, addr, syscall.EADDRINUSE)
	}
	l := &listener{p: p, port: k, cond: sync.NewCond(&n.mu)}
	p.h.listeners[k] = l
	return l, nil
}

type listener struct {
	p      *process
	port   int
	cond   *sync.Cond
	queue  []*conn
	closed bool
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	n := l.p.h.n
	n.mu.Lock()
	defer n.mu.Unlock()
	for {
		if l.closed || !l.p.alive() {
			return nil, net.ErrClosed
		}
		if len(l.queue) > 0 && !l.p.h.frozen {
			c := l.queue[0]
			l.queue = l.queue[1:]
			return c, nil
		}
		l.cond.Wait()
	}
}

// Close implements net.Listener.
func (l *listener) Close() error {
	n := l.p.h.n
	n.mu.Lock()
	defer n.mu.Unlock()
	l.closed = true
	if l.p.h.listeners[l.port] == l {
		delete(l.p.h.listeners, l.port)
	}
	for _, c := range l.queue {
		c.reset()
	}
	l.queue = nil
	l.cond.Broadcast()
	return nil
}

// Addr implements net.Listener.
func (l *listener) Addr() net.Addr { return &net.TCPAddr{IP: l.p.h.ip, Port: l.port} }

// dialMost is how long an attempt to connect lasts where the caller sets no end.
const dialMost = time.Second

// dial is role.Deps.Dial.
func (p *process) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, dialMost, syscall.ETIMEDOUT)
	defer cancel()
	c, err := p.connect(ctx, addr)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Err: fmt.Errorf("%s: %w", addr, err)}
	}
	return c, nil
}

func (p *process) connect(ctx context.Context, addr string) (net.Conn, error) {
	ip, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	k, err := strconv.Atoi(port)
	if err != nil {
		return nil, err
	}
	n := p.h.n
	n.mu.Lock()
	to, d := n.hosts[ip], n.delay()
	if ip == movable {
		to = n.moved[p.h.name]
	}
	n.mu.Unlock()
	if to == nil {
		return nil, syscall.EHOSTUNREACH
	}
	if err := p.sleep(ctx, 2*d); err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	stop := context.AfterFunc(ctx, func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		p.h.thawed.Broadcast()
	})
	defer stop()
	for p.alive() && (p.h.frozen || !n.open(p.h, to)) {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		p.h.thawed.Wait()
	}
	if !p.alive() {
		return nil, errDead
	}
	l := to.listeners[k]
	if l == nil || l.closed || !l.p.alive() {
		return nil, syscall.ECONNREFUSED
	}
	if n.twice > 0 && n.rnd.Float64() < n.twice {
		p.pipe(l).shut()
	}
	return p.pipe(l), nil
}

// pipe makes a connection to a listener, and returns this process's end. n.mu is held.
func (p *process) pipe(l *listener) *conn {
	n := p.h.n
	p.h.ports++
	mine := &conn{n: n, h: p.h, p: p, local: &net.TCPAddr{IP: p.h.ip, Port: p.h.ports}, cond: sync.NewCond(&n.mu)}
	theirs := &conn{n: n, h: l.p.h, p: l.p, local: &net.TCPAddr{IP: l.p.h.ip, Port: l.port}, cond: sync.NewCond(&n.mu)}
	mine.peer, theirs.peer = theirs, mine
	p.h.conns[mine], l.p.h.conns[theirs] = struct{}{}, struct{}{}
	l.queue = append(l.queue, theirs)
	l.cond.Broadcast()
	return mine
}
