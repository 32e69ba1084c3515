package swarm

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"
)

// The library panics when a deadline can't be set, and a connection may be closed by then: only what it reads next may
// tell.
func TestDeadlineOfAClosedConnection(t *testing.T) {
	n := newNode(t, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c := n.wrap(nc, &address{text: "x", addr: netip.MustParseAddrPort(l.Addr().String())}, true)
	if !n.admit(c) {
		t.Fatal("no room for a connection")
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := nc.SetDeadline(time.Now()); !errors.Is(err, net.ErrClosed) {
		t.Fatalf("the plain connection answers %v, so this tests nothing", err)
	}
	var asTheLibrarySees net.Conn = c
	if err := asTheLibrarySees.SetDeadline(time.Now().Add(time.Second)); err != nil {
		t.Errorf("setting a deadline answers %v", err)
	}
	if _, err := asTheLibrarySees.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("reading answers %v, want that it is closed", err)
	}
}
