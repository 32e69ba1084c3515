package transport

import (
	"context"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
)

// ethernetPair is both ends of a connection over loopback with segments as on Ethernet.
func ethernetPair(t *testing.T) (sender, receiver *net.TCPConn) {
	t.Helper()
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_MAXSEG, 1460) })
		return errors.Join(cerr, err)
	}}
	l, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		defer close(accepted)
		if c, err := l.Accept(); err == nil {
			accepted <- c
		}
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	a := <-accepted
	if a == nil {
		t.Fatal("not accepted")
	}
	t.Cleanup(func() { a.Close() })
	return a.(*net.TCPConn), c.(*net.TCPConn)
}

func TestPathOf(t *testing.T) {
	sender, receiver := ethernetPair(t)
	for name, c := range map[string]*net.TCPConn{"sender": sender, "receiver": receiver} {
		// The handshake is measured already. Options take a part of a segment.
		if p, ok := PathOf(c); !ok || p.RoundTrip <= 0 || p.Segment < 1400 || p.Segment > 1460 {
			t.Errorf("%s: %+v, %v", name, p, ok)
		}
	}
	receiver.Close()
	if p, ok := PathOf(receiver); ok {
		t.Errorf("%+v of a closed connection", p)
	}
}

// TestSetReceiveWindow: what the sender sees, also when a window that was small is made larger.
func TestSetReceiveWindow(t *testing.T) {
	sender, receiver := ethernetPair(t)
	send := func(some int64) (window int) {
		t.Helper()
		done := make(chan error, 1)
		go func() {
			_, err := sender.Write(make([]byte, some))
			done <- err
		}()
		if _, err := io.CopyN(io.Discard, receiver, some); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		info, err := tcpInfo(sender)
		if err != nil {
			t.Fatal(err)
		}
		return int(info.Snd_wnd)
	}
	before := send(2 << 20)
	for _, n := range []int{12 << 10, 64 << 10, 12 << 10} {
		if err := SetReceiveWindow(receiver, n); err != nil {
			t.Fatal(err)
		}
		// What it was allowed it still sends.
		w := send(int64(before) + 2<<20)
		if w < n/3 || w > n {
			t.Errorf("the sender may have %d bytes on the way, want up to %d (%d before)", w, n, before)
		}
		before = w
	}
}
