package transport

import (
	"net"
	"syscall"
	"testing"
	"time"
)

// fixed is a listener that accepts one connection.
type fixed struct {
	net.Listener
	c net.Conn
}

func (f fixed) Accept() (net.Conn, error) { return f.c, nil }

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

// TestShortPathsGetShortQueues: a server's connection over a short path has a bounded send buffer and is still the connection that sendfile
// takes; what is no TCP is passed on as it is.
func TestShortPathsGetShortQueues(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	out, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	in, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	rtt, err := roundTrip(in.(*net.TCPConn))
	if err != nil || rtt <= 0 || rtt > time.Minute {
		t.Fatalf("round trip %s, %v", rtt, err)
	}
	before := sendBuffer(t, in)
	c, err := shortQueues{fixed{l, in}}.Accept()
	if err != nil || c != in {
		t.Fatalf("accepted %T, %v", c, err)
	}
	// The system may allow less (net.core.wmem_max).
	if got := sendBuffer(t, c); rtt < shortPath && got > 2*shortQueue || rtt >= shortPath && got != before {
		t.Errorf("round trip %s: send buffer %d, it was %d", rtt, got, before)
	}
	ours, theirs := net.Pipe()
	defer ours.Close()
	defer theirs.Close()
	if c, err := (shortQueues{fixed{l, ours}}).Accept(); err != nil || c != ours {
		t.Errorf("accepted %T, %v", c, err)
	}
}
