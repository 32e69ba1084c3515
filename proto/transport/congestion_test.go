package transport

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestCongestionName(t *testing.T) {
	for _, tc := range []struct{ choice, now, want string }{
		{"", "bbr", ""},
		{"system", "bbr", ""},
		{"system", "cubic", ""},
		{"fair", "bbr", "cubic"},
		{"fair", "bbr2", "cubic"},
		{"fair", "cubic", ""},
		{"fair", "dctcp", ""},
		{"fair", "", ""}, // not known
		{"reno", "bbr", "reno"},
		{"bbr", "cubic", "bbr"},
		{"bbr", "bbr", ""},
	} {
		if got := congestionName(tc.choice, tc.now); got != tc.want {
			t.Errorf("%q where the system has %q: sets %q, want %q", tc.choice, tc.now, got, tc.want)
		}
	}
}

// TestCongestionControl: what connections that come in have. Every Linux has reno and lets everybody use it.
func TestCongestionControl(t *testing.T) {
	serve := func(choice string) (string, error) {
		t.Helper()
		got := make(chan string, 1)
		s, err := NewServer("test", ServerConfig{Listen: "127.0.0.1:0", CongestionControl: choice}, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			got <- congestionOf(t, r.Context().Value(connKey{}).(net.Conn))
		}), slog.New(slog.DiscardHandler))
		if err != nil {
			return "", err
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		resp, err := http.Get(s.URL())
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		cancel()
		return <-got, <-done
	}
	system, err := serve("")
	if err != nil {
		t.Fatal(err)
	}
	for choice, want := range map[string]string{"reno": "reno", "system": system} {
		if got, err := serve(choice); err != nil || got != want {
			t.Errorf("%q: connections have %q, %v, want %q", choice, got, err, want)
		}
	}
	if got, err := serve("fair"); err != nil || got != system && got != "cubic" {
		t.Errorf("fair: connections have %q, %v, want %q or cubic", got, err, system)
	}
	_, err = serve("nosuch")
	if !errors.Is(err, ErrCongestionControl) || !strings.Contains(err.Error(), "nosuch") || !strings.Contains(err.Error(), "reno") {
		t.Errorf("a name that no system has: %v, want ErrCongestionControl, and what there is", err)
	}
}

func congestionOf(t *testing.T, c net.Conn) string {
	t.Helper()
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Error(err)
		return ""
	}
	var name string
	cerr := raw.Control(func(fd uintptr) { name, err = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION) })
	if err := errors.Join(cerr, err); err != nil {
		t.Error(err)
	}
	return name
}
