package transport

import (
	"net"
	"net/http"
	"syscall"
	"testing"
	"time"
)

func sendBuffer(t *testing.T, c net.Conn) (n int) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	cerr := raw.Control(func(fd uintptr) { n, err = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF) })
	if cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	return n
}

// accepted is a server's connection over loopback.
func accepted(t *testing.T) net.Conn {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	out, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Close() })
	in, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close() })
	return in
}

// Connections get a bounded send buffer when they serve a request beside more than few others, and only those.
func TestCrowdsGetShortQueues(t *testing.T) {
	x := newCrowd()
	x.few = 2
	var conns []net.Conn
	var own []int // the kernel's buffers
	for range 4 {
		c := accepted(t)
		conns, own = append(conns, c), append(own, sendBuffer(t, c))
		x.connState(c, http.StateNew)
	}
	bounded := func(i int) bool { return sendBuffer(t, conns[i]) != own[i] }
	expect := func(when string, want ...bool) {
		t.Helper()
		for i, w := range want {
			if rtt, err := roundTrip(conns[i].(*net.TCPConn)); err != nil || rtt <= 0 || rtt >= shortPath {
				t.Skipf("loopback takes %s here, %v", rtt, err)
			}
			if bounded(i) != w {
				t.Errorf("%s: connection %d has a send buffer of %d, the kernel's is %d", when, i, sendBuffer(t, conns[i]), own[i])
			}
		}
	}
	x.connState(conns[0], http.StateActive)
	x.connState(conns[1], http.StateActive)
	expect("as many as processors", false, false, false, false)
	x.connState(conns[0], http.StateIdle)
	x.connState(conns[2], http.StateActive)
	expect("an idle one does not count", false, false, false, false)
	x.connState(conns[3], http.StateActive)
	expect("one more", false, false, false, true)
	for _, c := range conns {
		x.connState(c, http.StateClosed)
	}
	if len(x.active)+len(x.short)+x.now != 0 {
		t.Errorf("closed connections are remembered: %+v", x)
	}

	// What is no TCP is left as it is.
	ours, theirs := net.Pipe()
	defer ours.Close()
	defer theirs.Close()
	x.few = 0
	x.connState(ours, http.StateActive)
	if err := ours.SetDeadline(time.Now()); err != nil {
		t.Error(err)
	}
}
