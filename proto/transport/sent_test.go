package transport

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"syscall"
	"testing"
	"time"
)

func smallReceiveBuffer(_, _ string, c syscall.RawConn) (err error) {
	cerr := c.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4<<10) })
	return errors.Join(cerr, err)
}

// A handler is done with writing long before a client that does not read has got it: AwaitSent waits for that.
func TestAwaitSent(t *testing.T) {
	const size = 128 << 10 // what a short queue holds
	wrote, sent := make(chan struct{}), make(chan struct{})
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/small" {
			AwaitSent(r.Context(), time.Minute)
			return
		}
		buf := make([]byte, 64<<10)
		for range size / len(buf) {
			if _, err := w.Write(buf); err != nil {
				t.Error(err)
			}
		}
		close(wrote)
		AwaitSent(r.Context(), time.Minute)
		close(sent)
	})
	s, err := NewServer("test", ServerConfig{Listen: "127.0.0.1:0"}, h, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()

	// The receive buffer is small, so that the server's kernel has to keep most.
	d := net.Dialer{Control: smallReceiveBuffer}
	c, err := d.Dial("tcp", s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-wrote:
	case <-time.After(10 * time.Second):
		t.Skip("this kernel does not take 128 KiB at once")
	}
	select {
	case <-sent:
		t.Error("said to be sent, but the client has read nothing")
	case <-time.After(50 * time.Millisecond):
	}
	if _, err := io.Copy(io.Discard, c); err != nil {
		t.Fatal(err)
	}
	<-sent

	resp, err := http.Get("http://" + s.Addr() + "/small")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	AwaitSent(context.Background(), time.Minute) // no request: nothing to wait for
}

// A slow client is waited for while it takes something, and no longer than the limit when it takes nothing.
func TestAwaitSentOfASlowClient(t *testing.T) {
	const size, limit = 128 << 10, 2 * time.Second
	wrote, sent := make(chan struct{}), make(chan struct{})
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write(make([]byte, size))
		close(wrote)
		AwaitSent(r.Context(), limit)
		close(sent)
	}))
	s.Config.ConnContext = withConn
	s.Start()
	defer s.Close()
	request := func() net.Conn {
		d := net.Dialer{Control: smallReceiveBuffer}
		c, err := d.Dial("tcp", s.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		select {
		case <-wrote:
		case <-time.After(10 * time.Second):
			c.Close() // or the server waits for its handler
			t.Skip("this kernel does not take 128 KiB at once")
		}
		return c
	}
	c := request()
	defer c.Close()
	began, n := time.Now(), 0
	tick := time.NewTicker(3 * limit * (4 << 10) / size)
	defer tick.Stop()
	for open := true; open; <-tick.C {
		k, err := c.Read(make([]byte, 4<<10))
		n += k
		select {
		case <-sent:
			open = false
		default:
			open = err == nil
		}
	}
	if took := time.Since(began); n < size/2 || took < limit {
		t.Errorf("said to be sent after %s, when the client had read %d of %d bytes", took, n, size)
	}

	wrote, sent = make(chan struct{}), make(chan struct{})
	c2 := request()
	defer c2.Close()
	select {
	case <-sent:
	case <-time.After(10 * limit):
		t.Error("it waits for a client that reads nothing")
	}
}
