package transport

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// A client that sends all of its body before it reads gets the answer that refused it.
func TestRefusalReachesWhoStillSends(t *testing.T) {
	refuse := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n, err := io.CopyN(io.Discard, r.Body, 1000); n != 1000 {
			t.Error(n, err)
		}
		w.Header().Set("Content-Length", "2")
		w.WriteHeader(http.StatusInsufficientStorage)
		fmt.Fprint(w, "no")
	})
	s := running(t, ServerConfig{Listen: "127.0.0.1:0"}, Middleware("test", quiet(), prometheus.NewRegistry())(refuse))
	const size = 8 << 20
	for _, chunked := range []bool{false, true} {
		c, err := net.Dial("tcp", s.Addr())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		if chunked {
			fmt.Fprintf(c, "PATCH / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
		} else {
			fmt.Fprintf(c, "PATCH / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", size)
		}
		block := make([]byte, 64<<10)
		for sent := 0; sent < size; sent += len(block) {
			var err error
			if chunked {
				_, err = fmt.Fprintf(c, "%x\r\n%s\r\n", len(block), block)
			} else {
				_, err = c.Write(block)
			}
			if err != nil {
				t.Fatalf("chunked %v: after %d bytes: %v", chunked, sent, err)
			}
		}
		if chunked {
			fmt.Fprint(c, "0\r\n\r\n")
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil || resp.StatusCode != http.StatusInsufficientStorage || !resp.Close {
			t.Errorf("chunked %v: %+v, %v", chunked, resp, err)
			continue
		}
		if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "no" {
			t.Errorf("chunked %v: %q, %v", chunked, b, err)
		}
	}
}

// A refusal with little left to read keeps the connection.
func TestSmallRefusalKeepsTheConnection(t *testing.T) {
	refuse := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) })
	s := running(t, ServerConfig{Listen: "127.0.0.1:0"}, Middleware("test", quiet(), prometheus.NewRegistry())(refuse))
	c, err := net.Dial("tcp", s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	in := bufio.NewReader(c)
	for range 2 {
		fmt.Fprintf(c, "PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello")
		resp, err := http.ReadResponse(in, nil)
		if err != nil || resp.StatusCode != http.StatusNotFound || resp.Close {
			t.Fatalf("%+v, %v", resp, err)
		}
		resp.Body.Close()
	}
}

// A client that has nothing more to say may shut its half of the connection and wait.
func TestHalfClosedClientIsAnswered(t *testing.T) {
	seen := make(chan struct{})
	slow := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		<-seen
		if err := r.Context().Err(); err != nil {
			t.Errorf("the request was given up: %v", err)
		}
		fmt.Fprint(w, "hello")
	})
	watch := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		go func() {
			<-r.Context().Done() // net/http has seen the end
			close(seen)
		}()
		AnswerHalfClosed(slow).ServeHTTP(w, r)
	})
	s := running(t, ServerConfig{Listen: "127.0.0.1:0"}, watch)
	c, err := net.Dial("tcp", s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "hello" {
		t.Errorf("%q, %v", b, err)
	}
}
