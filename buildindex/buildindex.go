// Package buildindex is the manifest half of a registry: manifests, tags, referrers, the catalog, and which repository
// holds which blob. Names live in SQL; a change is acknowledged when it is in SQL and in a second place, first on two
// origins, then in the bucket, from which everything can be restored. It holds no layer bytes.
package buildindex

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"kraken/buildindex/names"
	"kraken/buildindex/names/sqlite"
	"kraken/origin/bucket"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// Index is one running build-index.
type Index struct {
	cfg     Config
	log     *slog.Logger
	m       *metrics
	db      names.Store
	buckets *bucket.Set
	origins *cluster.Origins
	health  *transport.Health
	server  *transport.Server
	admin   *transport.Server

	restored   atomic.Bool  // a miss in SQL is a 404; before, it is "not known yet"
	generation atomic.Int64 // the last one given out
	kick       chan struct{}
	lastErr    atomic.Pointer[string] // of the outbox
	aside      aside                  // what can't go on for a reason of its own
	signer     *cluster.NameSigner    // nil where none is configured
	keys       cluster.NameKeys       // whose records are believed; all where there is none
	stripes    [256]chan struct{}     // one writer per name: a channel of one, which is full while a name is locked
	seed       maphash.Seed
}

// New opens the database and binds the listeners. Run serves, restores and writes to the bucket.
func New(cfg Config, deps role.Deps) (_ *Index, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	x := &Index{cfg: cfg, log: deps.Log, kick: make(chan struct{}, 1), seed: maphash.MakeSeed(), health: transport.NewHealth()}
	for i := range x.stripes {
		x.stripes[i] = make(chan struct{}, 1)
	}
	ctx := context.Background()
	hc, err := transport.NewClient(cfg.Client, deps.Log)
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	if x.origins, err = cluster.NewOrigins(cfg.Origins, cfg.Replicas, cluster.Stall, hc); err != nil {
		return nil, err
	}
	if x.buckets, err = bucket.OpenAll(ctx, cfg.Buckets, bucket.NewMetrics(deps.Registry)); err != nil {
		return nil, err
	}
	if err := x.openKeys(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(cfg.Database), 0o700); err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	if x.db, err = sqlite.Open(ctx, cfg.Database); err != nil {
		return nil, err
	}
	undo := []func() error{x.db.Close}
	defer func() {
		if err != nil {
			for i := len(undo) - 1; i >= 0; i-- {
				err = errors.Join(err, undo[i]())
			}
		}
	}()
	done, err := x.db.Meta(ctx, metaRestored)
	if err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	x.restored.Store(done != "")
	state, err := x.db.State(ctx)
	if err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	x.generation.Store(state.LastGeneration)
	if err := x.aside.load(ctx, x.db); err != nil {
		return nil, err
	}
	x.m = newMetrics(deps.Registry, x)
	x.health.AddCheck("database", true, x.db.Ping)
	x.health.AddCheck("restored", false, func(context.Context) error {
		if !x.restored.Load() {
			return errors.New("names are being restored; what is not known yet is answered with 503")
		}
		return nil
	})
	x.health.AddCheck("set aside", false, x.aside.check)
	x.health.AddCheck("generations", false, func(context.Context) error { return generationHolds(x.generation.Load()) })
	for _, o := range x.origins.All() {
		x.health.AddCheck(o.ID, false, o.Ping)
	}
	if x.server, err = transport.NewServer("registry", cfg.Server, x.handler(deps.Registry), deps.Log); err != nil {
		return nil, err
	}
	undo = append(undo, x.server.Close)
	if cfg.Admin.Listen != "" {
		if x.admin, err = transport.NewServer("admin", cfg.Admin, x.adminHandler(deps.Registry), deps.Log); err != nil {
			return nil, err
		}
	}
	return x, nil
}

// Addr is the address of the registry listener.
func (x *Index) Addr() string { return x.server.Addr() }

// AdminAddr is the address of the admin listener, empty when there is none.
func (x *Index) AdminAddr() string {
	if x.admin == nil {
		return ""
	}
	return x.admin.Addr()
}

// Run serves until ctx is done, then drains and closes the database.
func (x *Index) Run(ctx context.Context) error {
	defer x.origins.Close()
	var g role.Group
	g.Add("outbox", x.outbox)
	g.Add("restore", x.restore)
	if x.admin != nil {
		g.Add("admin", x.admin.Run)
	}
	g.Add("registry", x.server.Run)
	g.Add("readiness", func(ctx context.Context) error {
		<-ctx.Done()
		x.health.SetDraining()
		return nil
	})
	return errors.Join(g.Run(ctx), x.db.Close())
}

// openKeys reads the keys of name records, and makes the private one where it is missing.
func (x *Index) openKeys() (err error) {
	if x.keys, err = cluster.ParseNameKeys(x.cfg.RecordKeys); err != nil {
		return fmt.Errorf("record_keys: %w", err)
	}
	if x.cfg.RecordKeyFile == "" {
		return nil
	}
	signer, made, err := cluster.OpenNameSigner(x.cfg.RecordKeyFile)
	if err != nil {
		return fmt.Errorf("record_key_file: %w", err)
	}
	x.signer, x.keys = signer, append(x.keys, signer.Public())
	public := base64.StdEncoding.EncodeToString(signer.Public())
	if made {
		x.log.Warn("made a key to sign name records with: keep a copy, and add its public half to record_keys of all origins", "file", x.cfg.RecordKeyFile, "public", public)
	} else {
		x.log.Info("name records are signed", "public", public)
	}
	return nil
}

// miss is the answer for what SQL does not have.
func (x *Index) miss(kind *registry.Error, format string, args ...any) error {
	what := fmt.Sprintf(format, args...)
	if x.restored.Load() {
		return fmt.Errorf("%w: %s", kind, what)
	}
	return &registry.RetryError{Err: fmt.Errorf("%w: %s: names are being restored", registry.ErrUnavailable, what), After: time.Second}
}

// requireRestored returns ErrUnavailable until the restore is done, because SQL may be incomplete or stale until then.
func (x *Index) requireRestored(format string, args ...any) error {
	if x.restored.Load() {
		return nil
	}
	return x.miss(registry.ErrUnavailable, format, args...)
}
