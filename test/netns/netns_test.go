package netns

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"
)

// TestNetwork has two nodes that reach each other, a link that keeps to its rate, counts of what went through, and
// nothing left afterwards.
func TestNetwork(t *testing.T) {
	if _, err := exec.LookPath("tc"); err != nil || os.Geteuid() != 0 {
		t.Skip("needs root, ip and tc")
	}
	tag := fmt.Sprintf("kt%d", os.Getpid())
	n, err := New(tag, "one", "two")
	if err != nil {
		t.Skip("no network namespaces here: ", err)
	}
	if _, err := New(tag, "three"); err == nil {
		t.Error("a tag is taken twice")
	}
	again, err := Open(tag)
	if err != nil || len(again.Nodes) != 2 {
		t.Errorf("found again: %v, %v", again, err)
	}
	limited, err := again.Find("two")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := again.Find("nobody"); err == nil {
		t.Error("found a node that was not made")
	}
	if err := n.Shape(8, limited...); err != nil {
		t.Fatal(err)
	}
	const size = 500_000 // half a second at 8 Mbit/s
	began := time.Now()
	if err := move(n.Nodes[0], n.Nodes[1], size); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	if took < 300*time.Millisecond {
		t.Errorf("%d bytes at 8 Mbit/s took %s", size, took)
	}
	seen, err := n.Since(nil)
	if got := seen["two"]; err != nil || got.Received < size || got.Received > size*1.1 || got.Sent > size/2 {
		t.Errorf("counted %+v, %v", got, err)
	}
	if err := n.Shape(0, limited...); err != nil {
		t.Error(err)
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if _, err := Open(tag); err == nil {
		t.Error("something is left")
	}
}

// move sends bytes from one node to another, and returns when they are there.
func move(from, to *Node, size int) error {
	l, err := to.Listen(1234)
	if err != nil {
		return err
	}
	defer l.Close()
	sent := make(chan error, 1)
	go func() {
		sent <- from.Enter(func() error {
			c, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write(make([]byte, size))
			return err
		})
	}()
	c, err := l.Accept()
	if err != nil {
		return err
	}
	defer c.Close()
	if n, err := io.Copy(io.Discard, c); n != int64(size) || err != nil {
		return fmt.Errorf("%d bytes came, %w", n, err)
	}
	return <-sent
}

// TestNames refuses names that the kernel would.
func TestNames(t *testing.T) {
	for _, name := range []string{"hub", "more-than-13-characters", "a/b", "a b"} {
		if _, err := New("kt", name); err == nil {
			t.Errorf("node %q is taken", name)
		}
	}
}
