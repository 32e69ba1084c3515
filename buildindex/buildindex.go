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
	"sync"
	"sync/atomic"
	"time"

	"kraken/buildindex/names"
	"kraken/origin/bucket"
	"kraken/origin/upstream"
	"kraken/proto/cluster"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// Index is one running build-index.
type Index struct {
	*role.Chassis
	cfg     Config
	log     *slog.Logger
	m       *metrics
	db      names.Store // nil until opened
	opened  atomic.Bool // false while another process has the database
	buckets *bucket.Set
	origins *cluster.Origins
	mirror  *mirror

	restored   atomic.Bool  // a miss in SQL is a 404; before, it is "not known yet"
	generation atomic.Int64 // the last one given out
	stale      atomic.Bool  // SQL is older than what it has acknowledged: what it has counts only once it was looked up
	began      time.Time
	lanes      []*lane

	heardOrigins chan struct{} // closed when enough origins were heard since the start
	hearOnce     sync.Once
	heardFrom    sync.Map      // ids of origins of which SQL has all since the start
	hearSoon     chan struct{} // has one when another of them answers
	forgetSoon   chan struct{} // has one when origins know a later generation
	lookSoon     chan struct{} // has one when all origins can be counted
	counted      atomic.Bool   // how many origins keep each queued change
	unknown      unknown
	sweptBuckets sync.Map // names of buckets of which SQL has all names
	lookups      lookups
	unproven     unproven
	tenure       tenure
	short        short
	writing      writing
	publications publications
	sweepPart    int
	keptWait     time.Duration
	lockHeld     *os.File // the lock beside the database

	aside   aside               // what can't go on for a reason of its own
	signer  *cluster.NameSigner // nil where none is configured
	keys    cluster.NameKeys    // whose records are believed; all where there is none
	stripes [256]chan struct{}  // one writer per name: a channel of one, which is full while a name is locked
	seed    maphash.Seed
}

// New opens the database and binds the listeners. Run serves, restores and writes to the bucket.
func New(cfg Config, deps role.Deps) (*Index, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	x := &Index{cfg: cfg, log: deps.Log, began: time.Now(), heardOrigins: make(chan struct{}), hearSoon: make(chan struct{}, 1), lookSoon: make(chan struct{}, 1), forgetSoon: make(chan struct{}, 1), tenure: tenure{begun: make(chan struct{})}, sweepPart: defaultSweepPart, keptWait: defaultKeptWait, seed: maphash.MakeSeed()}
	x.lanes = x.newLanes()
	for i := range x.stripes {
		x.stripes[i] = make(chan struct{}, 1)
	}
	if err := role.Open(cfg.Config, deps, cluster.Stall, x.assemble); err != nil {
		return nil, err
	}
	return x, nil
}

// assemble puts the build-index on its chassis.
func (x *Index) assemble(c *role.Chassis) (err error) {
	x.Chassis, x.origins = c, c.Origins
	if x.buckets, err = bucket.OpenAll(c.Context(), x.cfg.Buckets, bucket.NewMetrics(c.Registry)); err != nil {
		return err
	}
	if err := x.openKeys(); err != nil {
		return err
	}
	set, err := upstream.Open(x.cfg.Upstreams, upstream.Options{Log: x.log, Metrics: c.Registry})
	if err != nil {
		return fmt.Errorf("upstreams: %w", err)
	}
	c.Closes(func() error { set.Close(); return nil })
	x.mirror = newMirror(x, set, newMirrorMetrics(c.Registry))
	c.Closes(x.closeDatabase)
	if err := x.openDatabase(c.Context()); err != nil && !errors.Is(err, errBusy) {
		return err // where another has it, hold opens it when that is gone
	}
	x.m = newMetrics(c.Registry, x)
	x.addChecks(c.Health)
	c.Part("holder", x.hold)
	c.Part("forget", x.forgetting)
	c.Part("outbox", x.outbox)
	c.Part("records", x.topUp)
	c.Part("restore", x.restore)
	c.Part("mirror", x.mirror.keep)
	h, err := x.handler(c.Registry)
	if err != nil {
		return err
	}
	return c.Serve("registry", h, x.adminRoutes)
}

// openDatabase opens SQL and reads where it stands.
func (x *Index) openDatabase(ctx context.Context) (err error) {
	if err := os.MkdirAll(filepath.Dir(x.cfg.Database), 0o700); err != nil {
		return fmt.Errorf("database: %w", err)
	}
	lock, err := lockFile(x.cfg.Database + ".lock")
	if err != nil {
		return fmt.Errorf("database: %w", err)
	}
	x.lockHeld = lock
	db, err := x.cfg.OpenNames(ctx, x.cfg.Database)
	if err != nil {
		return err
	}
	x.db = db
	for _, k := range []struct {
		key string
		to  *atomic.Bool
	}{{metaRestored, &x.restored}, {metaStale, &x.stale}} {
		v, err := x.db.Meta(ctx, k.key)
		if err != nil {
			return fmt.Errorf("database: %w", err)
		}
		k.to.Store(v != "")
	}
	hearing, err := x.db.Meta(ctx, metaHearing)
	if err != nil {
		return fmt.Errorf("database: %w", err)
	}
	x.unproven.all = hearing != "" && !x.restored.Load()
	state, err := x.db.State(ctx)
	if err != nil {
		return fmt.Errorf("database: %w", err)
	}
	x.generation.Store(state.LastGeneration)
	if err := x.aside.load(ctx, x.db); err != nil {
		return err
	}
	x.opened.Store(true)
	return nil
}

// closeDatabase closes SQL and then lets another process have it.
func (x *Index) closeDatabase() error {
	var errs []error
	if x.db != nil {
		errs = append(errs, x.db.Close())
	}
	if x.lockHeld != nil {
		errs = append(errs, x.lockHeld.Close())
	}
	return errors.Join(errs...)
}

// addChecks says what readiness asks.
func (x *Index) addChecks(h *transport.Health) {
	h.AddCheck("alone", true, x.checkTenure)
	h.AddCheck("database", true, func(ctx context.Context) error {
		if !x.opened.Load() {
			return errBusy
		}
		return x.db.Ping(ctx)
	})
	h.AddCheck("disk", false, x.checkSpace)
	h.AddCheck("restored", false, func(context.Context) error {
		if !x.restored.Load() {
			return errors.New("names are being restored; what is not known yet is answered with 503")
		}
		return nil
	})
	for _, l := range x.lanes {
		if l.name != "" {
			h.AddCheck("bucket "+l.name, false, l.check)
		}
	}
	h.AddCheck("set aside", false, x.aside.check)
	h.AddCheck("upstreams", false, x.mirror.set.Check)
	h.AddCheck("generations", false, func(context.Context) error { return generationHolds(x.generation.Load()) })
	for _, o := range x.origins.All() {
		h.AddCheck(o.ID, false, o.Ping)
	}
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

// requireComplete returns ErrUnavailable until SQL has all names of a repository.
func (x *Index) requireComplete(repo, what string) error {
	if x.complete(repo) {
		return nil
	}
	return x.notYet(what + " of " + repo)
}
