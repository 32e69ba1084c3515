package role

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/ring"
	"kraken/proto/transport"
)

func chassisConfig() Config {
	return Config{
		Server: transport.ServerConfig{Listen: "127.0.0.1:0"}, Admin: transport.ServerConfig{Listen: "127.0.0.1:0"},
		Origins: []ring.Member{{ID: "origin-01", URL: "http://127.0.0.1:1"}}, Replicas: 1,
	}
}

func chassisDeps() Deps {
	return Deps{Log: slog.New(slog.DiscardHandler), Registry: prometheus.NewRegistry()}
}

// diary is what happened to a role's parts, in order.
type diary []string

func (d *diary) closes(what string) func() error {
	return func() error { *d = append(*d, what); return nil }
}

// What a failed start had opened is closed in reverse, and nothing listens any more.
func TestFailedStartIsUndone(t *testing.T) {
	var d diary
	var c *Chassis
	refused := errors.New("no disk")
	err := Open(chassisConfig(), chassisDeps(), time.Second, func(opened *Chassis) error {
		c = opened
		c.Closes(d.closes("store"))
		c.Undo(d.closes("swarm"))
		if err := c.Serve("registry", http.NotFoundHandler(), nil); err != nil {
			return err
		}
		return refused
	})
	if !errors.Is(err, refused) {
		t.Errorf("ended with %v", err)
	}
	if want := (diary{"swarm", "store"}); !slices.Equal(d, want) {
		t.Errorf("closed %v, want %v", d, want)
	}
	for _, addr := range []string{c.Addr(), c.AdminAddr()} {
		if resp, err := http.Get("http://" + addr + "/"); err == nil {
			resp.Body.Close()
			t.Errorf("%s listens after a failed start", addr)
		}
	}
}

// A role that ends: first the listeners, then its parts, the last added first; then what it closes. Work in the
// background has ended before what it uses is closed.
func TestRoleEndsInReverse(t *testing.T) {
	var d diary
	var c *Chassis
	part := func(name string) func(context.Context) error {
		return func(ctx context.Context) error {
			<-ctx.Done()
			d = append(d, name)
			return nil
		}
	}
	err := Open(chassisConfig(), chassisDeps(), time.Second, func(opened *Chassis) error {
		c = opened
		c.Closes(d.closes("store"))
		c.Undo(d.closes("never: the start succeeds"))
		c.Part("swarm", part("swarm"))
		c.Part("background", c.EndBackground)
		c.Part("write-back", part("write-back"))
		return c.Serve("registry", http.NotFoundHandler(), func(m *http.ServeMux) {
			m.HandleFunc("GET /own", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "yes") })
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	if !c.Background(func(ctx context.Context) { <-ctx.Done(); d = append(d, "background") }) {
		t.Error("work was refused while the role is open")
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	for _, path := range []string{"/own", "/health", "/metrics"} {
		resp, err := http.Get("http://" + c.AdminAddr() + path)
		if err != nil {
			t.Fatal(err)
		}
		if resp.Body.Close(); resp.StatusCode != http.StatusOK {
			t.Errorf("admin %s: %s", path, resp.Status)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if want := (diary{"write-back", "background", "swarm", "store"}); !slices.Equal(d, want) {
		t.Errorf("ended %v, want %v", d, want)
	}
	if c.Background(func(context.Context) { t.Error("work began after the end") }) {
		t.Error("work was taken after the end")
	}
}
