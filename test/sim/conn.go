package sim

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// window is how many bytes may be on their way in one direction.
const window = 64 << 10

// conn is one end of a connection. All of it is guarded by n.mu.
type conn struct {
	n     *network
	h     *host
	p     *process
	local *net.TCPAddr
	peer  *conn
	cond  *sync.Cond

	in     []segment // what comes to this end
	inLen  int
	inEnd  bool // nothing comes after that
	noSend bool // what is sent from here arrives nowhere: a load balancer between has ended the connection
	closed bool // by this end
	err    error
	stale  bool // the other end was forgotten by its machine: what is sent there is answered by a reset

	read, write deadline
}

type segment struct {
	b  []byte
	at time.Time
}

type deadline struct {
	at    time.Time
	timer *time.Timer
}

func (d *deadline) over() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

// wake is called with n.mu.
func (c *conn) wake() { c.cond.Broadcast() }

// later wakes the conn at a time.
func (c *conn) later(at time.Time) {
	time.AfterFunc(time.Until(at), func() {
		c.n.mu.Lock()
		defer c.n.mu.Unlock()
		c.wake()
	})
}

// Read implements net.Conn.
func (c *conn) Read(b []byte) (int, error) {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, c.fail("read", net.ErrClosed)
		case !c.p.alive():
			return 0, c.fail("read", errDead)
		case c.h.frozen:
		case c.err != nil:
			return 0, c.fail("read", c.err)
		case c.read.over():
			return 0, c.fail("read", os.ErrDeadlineExceeded)
		case len(b) == 0:
			return 0, nil
		case len(c.in) > 0 && !c.in[0].at.After(time.Now()) && (c.n.open(c.h, c.peer.h) || c.peer.h.gone):
			n := copy(b, c.in[0].b)
			if c.in[0].b = c.in[0].b[n:]; len(c.in[0].b) == 0 {
				c.in = c.in[1:]
			}
			c.inLen -= n
			c.peer.wake()
			return n, nil
		case len(c.in) == 0 && c.inEnd && c.n.open(c.h, c.peer.h):
			return 0, io.EOF
		}
		c.cond.Wait()
	}
}

// Write implements net.Conn.
func (c *conn) Write(b []byte) (sent int, err error) {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	for {
		switch {
		case c.closed:
			return sent, c.fail("write", net.ErrClosed)
		case !c.p.alive():
			return sent, c.fail("write", errDead)
		case c.h.frozen:
			c.cond.Wait()
			continue
		case c.err != nil:
			return sent, c.fail("write", c.err)
		case c.stale:
			c.err = syscall.ECONNRESET
			c.wake()
			continue
		case c.noSend || c.peer.closed:
			return sent, c.fail("write", syscall.EPIPE)
		case c.write.over():
			return sent, c.fail("write", os.ErrDeadlineExceeded)
		case len(b) == 0:
			return sent, nil
		}
		n := min(len(b), window-c.peer.inLen)
		if n <= 0 {
			c.cond.Wait()
			continue
		}
		at := time.Now().Add(c.n.delay())
		if k := len(c.peer.in); k > 0 && c.peer.in[k-1].at.After(at) {
			at = c.peer.in[k-1].at
		}
		c.peer.in = append(c.peer.in, segment{append([]byte(nil), b[:n]...), at})
		c.peer.inLen += n
		c.peer.later(at)
		sent, b = sent+n, b[n:]
	}
}

func (c *conn) fail(op string, err error) error {
	if errors.Is(err, net.ErrClosed) {
		return err
	}
	return &net.OpError{Op: op, Net: "tcp", Source: c.local, Addr: c.peer.local, Err: err}
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.shut()
	return nil
}

// shut closes this end: by a reset where something was not read, as the kernel does. n.mu is held.
func (c *conn) shut() {
	c.closed = true
	delete(c.h.conns, c)
	for _, d := range []*deadline{&c.read, &c.write} {
		if d.timer != nil {
			d.timer.Stop()
		}
	}
	if len(c.in) > 0 {
		c.peer.in, c.peer.inLen = nil, 0
		c.peer.err = syscall.ECONNRESET
	} else if !c.noSend {
		c.end()
	}
	c.wake()
	c.peer.wake()
}

// end sends the end of what is sent. n.mu is held.
func (c *conn) end() {
	c.peer.inEnd = true
	at := time.Now().Add(c.n.delay())
	if k := len(c.peer.in); k > 0 {
		at = c.peer.in[k-1].at
	}
	c.peer.later(at)
}

// finish ends what comes to the other side, though this one goes on sending. n.mu is held.
func (c *conn) finish() {
	if !c.noSend && !c.closed {
		c.noSend = true
		c.end()
		c.wake()
	}
}

// reset is seen by both ends; what was on its way is lost. n.mu is held.
func (c *conn) reset() {
	for _, e := range []*conn{c, c.peer} {
		e.in, e.inLen = nil, 0
		e.err = syscall.ECONNRESET
		e.wake()
	}
}

// CloseWrite is TCP's half close.
func (c *conn) CloseWrite() error {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	c.finish()
	return nil
}

// LocalAddr implements net.Conn.
func (c *conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr implements net.Conn.
func (c *conn) RemoteAddr() net.Addr { return c.peer.local }

// SetDeadline implements net.Conn.
func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (c *conn) SetReadDeadline(t time.Time) error { return c.set(&c.read, t) }

// SetWriteDeadline implements net.Conn.
func (c *conn) SetWriteDeadline(t time.Time) error { return c.set(&c.write, t) }

func (c *conn) set(d *deadline, t time.Time) error {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	d.at = t
	c.wake()
	switch {
	case t.IsZero():
		if d.timer != nil {
			d.timer.Stop()
		}
	case d.timer == nil:
		d.timer = time.AfterFunc(time.Until(t), func() {
			c.n.mu.Lock()
			defer c.n.mu.Unlock()
			c.wake()
		})
	default:
		d.timer.Reset(time.Until(t))
	}
	return nil
}
