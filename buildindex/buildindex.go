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
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/buildindex/names/sqlite"
	"kraken/origin/bucket"
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
	origins *registry.Origins
	health  *transport.Health
	server  *transport.Server
	admin   *transport.Server

	restored   atomic.Bool  // a miss in SQL is a 404; before, it is "not known yet"
	generation atomic.Int64 // the last one given out
	kick       chan struct{}
	lastErr    atomic.Pointer[string] // of the outbox
	aside      aside                  // what can't go on for a reason of its own
	signer     *registry.NameSigner   // nil where none is configured
	keys       registry.NameKeys      // whose records are believed; all where there is none
	stripes    [256]sync.Mutex        // one writer per name
	seed       maphash.Seed
}

// New opens the database and binds the listeners. Run serves, restores and writes to the bucket.
func New(cfg Config, deps role.Deps) (_ *Index, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	x := &Index{cfg: cfg, log: deps.Log, kick: make(chan struct{}, 1), seed: maphash.MakeSeed(), health: transport.NewHealth()}
	ctx := context.Background()
	hc, err := transport.NewClient(cfg.Client, deps.Log)
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	if x.origins, err = registry.NewOrigins(cfg.Origins, cfg.Replicas, hc); err != nil {
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
	if x.keys, err = registry.ParseNameKeys(x.cfg.RecordKeys); err != nil {
		return fmt.Errorf("record_keys: %w", err)
	}
	if x.cfg.RecordKeyFile == "" {
		return nil
	}
	signer, made, err := registry.OpenNameSigner(x.cfg.RecordKeyFile)
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

// errClock is that the counter of generations can't go up.
var errClock = errors.New("the counter of changes is further ahead of this machine's clock than a change may be: set the clock right")

func generationHolds(n int64) error {
	if limit := time.Now().Add(registry.MaxGenerationSkew); n >= limit.UnixMicro() {
		return fmt.Errorf("%w: it stands at %d, and %s from now is %d", errClock, n, registry.MaxGenerationSkew, limit.UnixMicro())
	}
	return nil
}

// nextGeneration rises for ever, across restarts and restores on an empty disk: it is the time in microseconds, or one
// more than the last. ErrUnavailable when that is so far from now that nobody would believe it.
func (x *Index) nextGeneration() (int64, error) {
	for {
		last := x.generation.Load()
		if err := generationHolds(last); err != nil {
			return 0, fmt.Errorf("%w: %w", registry.ErrUnavailable, err)
		}
		next := max(time.Now().UnixMicro(), last+1)
		if x.generation.CompareAndSwap(last, next) {
			return next, nil
		}
	}
}

func (x *Index) sawGeneration(n int64) {
	for {
		last := x.generation.Load()
		if n <= last || x.generation.CompareAndSwap(last, n) {
			return
		}
	}
}

// lock lets one writer at a time change some names of a repository. The caller calls what it returns.
func (x *Index) lock(repo string, names ...string) (unlock func()) {
	var held []int
	for _, n := range names {
		held = append(held, int(maphash.String(x.seed, repo+"\x00"+n)%uint64(len(x.stripes))))
	}
	slices.Sort(held) // so that two writers can't wait for each other
	held = slices.Compact(held)
	for _, i := range held {
		x.stripes[i].Lock()
	}
	return func() {
		for _, i := range held {
			x.stripes[i].Unlock()
		}
	}
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

// storeRecord writes r to cfg.Replicas origins in parallel, trying further ones for those that fail. One copy is success with a
// warning; none is ErrUnavailable. raw is the manifest's bytes, for origins that know whole records only.
func (x *Index) storeRecord(ctx context.Context, r registry.NameRecord, raw []byte) error {
	var failed []error
	copies := 0
	for left := x.origins.For(placeOf(r)); len(left) > 0 && copies < x.cfg.Replicas; {
		n := min(x.cfg.Replicas-copies, len(left))
		errs := make([]error, n)
		var wg sync.WaitGroup
		for i, o := range left[:n] {
			wg.Go(func() {
				if err := x.putName(ctx, o, r, raw); err != nil {
					errs[i] = fmt.Errorf("origin %s: %w", o.ID, err)
				}
			})
		}
		wg.Wait()
		left = left[n:]
		for _, err := range errs {
			if err != nil {
				failed = append(failed, err)
			} else {
				copies++
			}
		}
	}
	if copies >= x.cfg.Replicas {
		return nil
	}
	if copies > 0 {
		x.log.Warn("a name is in fewer places than configured", "repository", r.Repository, "tag", r.Tag, "digest", r.Digest, "copies", copies, "error", errors.Join(failed...))
		return nil
	}
	return &registry.RetryError{Err: fmt.Errorf("%w: no origin keeps the name: %w", registry.ErrUnavailable, errors.Join(failed...)), After: time.Second}
}

// placeOf is what decides which origins keep a record: all of one manifest's are together.
func placeOf(r registry.NameRecord) digest.Digest {
	if r.Kind == registry.NameManifest {
		return digest.FromString(r.Repository + "\x00" + r.Digest.String())
	}
	return digest.FromString(registry.NameKey(r))
}

func (x *Index) putName(ctx context.Context, o *registry.Origin, r registry.NameRecord, raw []byte) error {
	err := o.PutName(ctx, r)
	var kind *registry.Error
	if err == nil || r.Version == registry.NameWhole || !errors.As(err, &kind) || kind.Status != http.StatusBadRequest || kind == registry.ErrRecordInvalid {
		return err
	}
	// An origin of the version before knows whole records only.
	r.Version, r.Bytes = registry.NameWhole, raw
	return o.PutName(ctx, x.signer.Sign(r))
}

// change makes changes durable in their second place and commits them in SQL with their outbox rows, all or none. Of
// records of one manifest the first has the bytes.
func (x *Index) change(ctx context.Context, rs []registry.NameRecord, f func(names.Tx) error) error {
	// What has begun is finished: a client that goes away must not leave one place ahead of the other.
	ctx = context.WithoutCancel(ctx)
	undo := func(n int) {
		for _, r := range rs[:n] {
			x.forget(ctx, r)
		}
	}
	for i, r := range rs {
		if err := x.storeRecord(ctx, x.signer.Sign(r), rs[0].Bytes); err != nil {
			undo(i)
			return err
		}
	}
	err := x.db.Update(ctx, func(tx names.Tx) error {
		if err := f(tx); err != nil {
			return err
		}
		for _, r := range rs {
			if err := tx.Enqueue(r); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		undo(len(rs))
		return x.conflict(err)
	}
	select {
	case x.kick <- struct{}{}:
	default:
	}
	return nil
}

// conflict returns what a client is told of a write that was not done because of what is there. A later generation than this
// change's was adopted, or written by another process, since it began: ErrUnavailable, and tried again it gets one above that.
func (x *Index) conflict(err error) error {
	var c *names.Conflict
	switch {
	case !errors.As(err, &c):
		return err
	case c.Kind == names.ErrNewer:
		x.sawGeneration(c.Now.Generation)
		return fmt.Errorf("%w: %w", registry.ErrUnavailable, err)
	}
	return refused(c)
}

// forget takes a record back from the origins. One that can't be reached is told by the next reconciliation.
func (x *Index) forget(ctx context.Context, r registry.NameRecord) {
	for _, o := range x.origins.All() {
		if err := o.DeleteName(ctx, x.signer.Deletion(r)); err != nil {
			x.log.Debug("origin still keeps a name", "origin", o.ID, "error", err)
		}
	}
}

func (x *Index) record(kind, repo, tag string, d digest.Digest) (registry.NameRecord, error) {
	n, err := x.nextGeneration()
	return registry.NameRecord{Version: registry.NameWhole, Kind: kind, Repository: repo, Tag: tag, Digest: d, Generation: n, Time: time.Now().UTC()}, err
}
