// Package pipes gives tests connections in memory, so that what waits for them runs on the clock of a synctest bubble.
package pipes

import (
	"context"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
)

// Listener is a net.Listener and who dials it.
type Listener struct {
	dials atomic.Int32
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

// Listen returns a listener whose connections nobody accepts yet.
func Listen() *Listener { return &Listener{conns: make(chan net.Conn), done: make(chan struct{})} }

// Serve serves h until the test ends.
func Serve(t *testing.T, h http.Handler) *Listener {
	t.Helper()
	l := Listen()
	srv := &http.Server{Handler: h}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	t.Cleanup(func() {
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
		<-served
	})
	return l
}

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *Listener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

// Addr implements net.Listener.
func (l *Listener) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }

// DialContext makes a connection, whatever the address.
func (l *Listener) DialContext(context.Context, string, string) (net.Conn, error) { return l.Dial() }

// Dial makes a connection.
func (l *Listener) Dial() (net.Conn, error) {
	l.dials.Add(1)
	ours, theirs := net.Pipe()
	select {
	case l.conns <- theirs:
		return ours, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Dials returns how many connections were made, or tried.
func (l *Listener) Dials() int { return int(l.dials.Load()) }
