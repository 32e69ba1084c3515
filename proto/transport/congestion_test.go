package transport

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestAutoCongestion(t *testing.T) {
	for _, tc := range []struct {
		now  string
		rtt  time.Duration
		want string
	}{
		{"bbr", 200 * time.Microsecond, "cubic"},
		{"bbr2", 9 * time.Millisecond, "cubic"},
		{"bbr", 10 * time.Millisecond, ""},
		{"bbr", 80 * time.Millisecond, ""},
		{"cubic", time.Millisecond, ""},
		{"dctcp", time.Millisecond, ""},
	} {
		if got := autoCongestion(tc.now, tc.rtt); got != tc.want {
			t.Errorf("%s over %v: %q, want %q", tc.now, tc.rtt, got, tc.want)
		}
	}
}

// TestCongestionControl: what connections that come in have. Every Linux has reno and lets everybody use it.
func TestCongestionControl(t *testing.T) {
	serve := func(choice string) (string, error) {
		t.Helper()
		got := make(chan string, 1)
		s, err := NewServer("test", ServerConfig{Listen: "127.0.0.1:0", CongestionControl: choice}, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			raw, err := tcpOf(r.Context().Value(connKey{}).(net.Conn)).SyscallConn()
			name := ""
			if err == nil {
				name, err = congestionOf(raw)
			}
			if err != nil {
				t.Error(err)
			}
			got <- name
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
	want := system
	if _, err := serve("cubic"); err == nil && strings.HasPrefix(system, "bbr") {
		want = "cubic"
	}
	if got, err := serve("auto"); err != nil || got != want {
		t.Errorf("auto: connections have %q, %v, want %q", got, err, want)
	}
	_, err = serve("nosuch")
	if !errors.Is(err, ErrCongestionControl) || !strings.Contains(err.Error(), "nosuch") || !strings.Contains(err.Error(), "reno") {
		t.Errorf("a name that no system has: %v, want ErrCongestionControl, and what there is", err)
	}
}
