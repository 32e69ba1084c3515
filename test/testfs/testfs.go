// Package testfs is the stand-in bucket of the dev cluster and the tests: a small S3-compatible server over a
// directory, so that a cluster uses the driver it uses in production. It asks nobody for credentials and is no
// production server.
package testfs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync/atomic"
	"syscall"

	"github.com/johannesboyne/gofakes3"

	"kraken/proto/transport"
)

var errNotDir = syscall.ENOTDIR

// Bucket is made at the start.
const Bucket = "kraken"

// Config configures a Server.
type Config struct {
	Listen string
	Dir    string
	Log    *slog.Logger
}

// Server is one running stand-in.
type Server struct {
	dir    *directory
	srv    *transport.Server
	down   atomic.Bool
	denied atomic.Bool
}

// New opens the directory and binds the listener.
func New(cfg Config) (*Server, error) {
	d, err := newDirectory(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("testfs: %w", err)
	}
	if ok, err := d.BucketExists(Bucket); err == nil && !ok {
		err = d.CreateBucket(Bucket)
		if err != nil {
			return nil, fmt.Errorf("testfs: %w", errors.Join(err, d.root.Close()))
		}
	}
	s := &Server{dir: d}
	s3 := gofakes3.New(d, gofakes3.WithLogger(gofakes3.DiscardLog()), gofakes3.WithTimeSkewLimit(0)).Server()
	h := transport.NewHealth()
	m := http.NewServeMux()
	m.HandleFunc("GET /health", h.Health)
	m.HandleFunc("GET /readiness", h.Readiness)
	m.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if s.down.Load() {
			http.Error(w, "down on purpose", http.StatusServiceUnavailable)
			return
		}
		if s.denied.Load() {
			w.Header().Set("Content-Type", "application/xml")
			w.WriteHeader(http.StatusForbidden)
			if r.Method != http.MethodHead {
				fmt.Fprint(w, `<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>`)
			}
			return
		}
		s3.ServeHTTP(w, r)
	})
	if s.srv, err = transport.NewServer("testfs", transport.ServerConfig{Listen: cfg.Listen}, m, cfg.Log); err != nil {
		return nil, errors.Join(err, d.root.Close())
	}
	return s, nil
}

// Addr is the bound host:port.
func (s *Server) Addr() string { return s.srv.Addr() }

// SetDown makes every request fail with 503, as a bucket that is down.
func (s *Server) SetDown(down bool) { s.down.Store(down) }

// SetDenied makes every request fail with 403, as a bucket that does not know the key.
func (s *Server) SetDenied(denied bool) { s.denied.Store(denied) }

// Run serves until ctx is done.
func (s *Server) Run(ctx context.Context) error {
	return errors.Join(s.srv.Run(ctx), s.dir.root.Close())
}
