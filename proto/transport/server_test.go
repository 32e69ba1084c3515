package transport

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/config"
)

// running serves h until the test ends.
func running(t *testing.T, cfg ServerConfig, h http.Handler) *Server {
	t.Helper()
	s, err := NewServer("test", cfg, h, quiet())
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestServerBindsAtOnce(t *testing.T) {
	s, err := NewServer("test", ServerConfig{Listen: "127.0.0.1:0"}, http.NotFoundHandler(), quiet())
	if err != nil {
		t.Fatal(err)
	}
	if _, port, err := net.SplitHostPort(s.Addr()); err != nil || port == "0" {
		t.Errorf("bound to %s (%v)", s.Addr(), err)
	}
	if want := "http://" + s.Addr(); s.URL() != want {
		t.Errorf("the URL is %s, want %s", s.URL(), want)
	}
	c, err := net.Dial("tcp", s.Addr())
	if err != nil {
		t.Errorf("before Run: %v", err)
	} else {
		c.Close()
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestAdvertise(t *testing.T) {
	s := running(t, ServerConfig{Listen: "127.0.0.1:0", Advertise: "origin-1.example:443"}, http.NotFoundHandler())
	if s.URL() != "http://origin-1.example:443" {
		t.Errorf("the URL is %s", s.URL())
	}
}

// TestTakenPort: the error names the address and who has it.
func TestTakenPort(t *testing.T) {
	s := running(t, ServerConfig{Listen: "127.0.0.1:0"}, http.NotFoundHandler())
	_, err := NewServer("second", ServerConfig{Listen: s.Addr()}, http.NotFoundHandler(), quiet())
	if err == nil {
		t.Fatal("the port was bound twice")
	}
	comm, rerr := os.ReadFile("/proc/self/comm")
	if rerr != nil {
		t.Skip("no /proc here:", rerr)
	}
	for _, want := range []string{"second", s.Addr(), fmt.Sprintf("process %d (%s)", os.Getpid(), strings.TrimSpace(string(comm)))} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not mention %q", err, want)
		}
	}
}

func TestPortOwnerOfNothing(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free := l.Addr().String()
	l.Close()
	for _, addr := range []string{free, "", "nonsense", "127.0.0.1:0", "127.0.0.1:99999", "127.0.0.1:http"} {
		if who := PortOwner(addr); who != "" {
			t.Errorf("%q belongs to %s", addr, who)
		}
	}
}

// TestDrain: a request in flight ends well, new connections are refused meanwhile.
func TestDrain(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	s, err := NewServer("test", ServerConfig{Listen: "127.0.0.1:0"}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(entered)
		<-leave
		_, _ = io.WriteString(w, "whole")
	}), quiet())
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	type result struct {
		body string
		err  error
	}
	got := make(chan result, 1)
	go func() {
		resp, err := http.Get(s.URL())
		if err != nil {
			got <- result{err: err}
			return
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		got <- result{string(b), err}
	}()
	<-entered
	stop()
	for { // until the listener is closed
		c, err := net.Dial("tcp", s.Addr())
		if err != nil {
			break
		}
		c.Close()
	}
	select {
	case err := <-done:
		t.Fatalf("Run ended with a request in flight: %v", err)
	default:
	}
	close(leave)
	if r := <-got; r.err != nil || r.body != "whole" {
		t.Errorf("the request in flight got %q, %v", r.body, r.err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	http.DefaultClient.CloseIdleConnections()
}

// TestDrainIsBounded: what is still there after DrainTimeout is cut off.
func TestDrainIsBounded(t *testing.T) {
	entered := make(chan struct{})
	var text bytes.Buffer
	s, err := NewServer("test", ServerConfig{Listen: "127.0.0.1:0", DrainTimeout: config.Duration(10 * time.Millisecond)},
		http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			close(entered)
			<-r.Context().Done()
		}), slog.New(slog.NewTextHandler(&text, nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done, got := make(chan error, 1), make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	go func() {
		resp, err := http.Get(s.URL())
		if err == nil {
			resp.Body.Close()
		}
		got <- err
	}()
	<-entered
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := <-got; err == nil {
		t.Error("the request that hangs got an answer")
	}
	if !strings.Contains(text.String(), "cut off") {
		t.Errorf("the log does not say so: %s", text.String())
	}
}

// TestSendfileOverSockets runs the whole way: a file through middleware and server.
func TestSendfileOverSockets(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789abcdef"), (chunk+chunk/2)/16)
	name := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	reg := prometheus.NewRegistry()
	s := running(t, ServerConfig{Listen: "127.0.0.1:0"}, Middleware("test", quiet(), reg)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeFile(w, r, name)
	})))
	c, err := NewClient(ClientConfig{}, quiet())
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.Get(s.URL())
	if err != nil {
		t.Fatal(err)
	}
	if got := readAll(t, resp.Body); got != string(content) {
		t.Errorf("got %d bytes, want %d", len(got), len(content))
	}
	c.Transport.(*progress).next.(*http.Transport).CloseIdleConnections()
}
