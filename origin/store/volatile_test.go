package store

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
)

// reboot makes the store's directory look as after a crash of the machine: another boot, and what is on the disk is of
// any time since.
func reboot(t *testing.T, dir string) {
	t.Helper()
	p := filepath.Join(dir, fileSynced)
	b, err := os.ReadFile(p)
	if err != nil {
		t.Fatal(err)
	}
	other := strings.Repeat("0", 36) + strings.TrimPrefix(string(b), bootID())
	if err := os.WriteFile(p, []byte(other), 0o644); err != nil {
		t.Fatal(err)
	}
}

// crash opens the store anew as after a crash of the machine, before which Close never came.
func crash(t *testing.T, s *Store) *Store {
	t.Helper()
	synced, err := os.ReadFile(filepath.Join(s.cfg.Dir, fileSynced))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.cfg.Dir, fileSynced), synced, 0o644); err != nil {
		t.Fatal(err)
	}
	reboot(t, s.cfg.Dir)
	return open(t, s.cfg)
}

// tick waits until the clock of file times has passed what is written by now: what is of the same tick as a sync counts
// as newer.
func tick(t *testing.T) {
	t.Helper()
	for began := time.Now(); ; runtime.Gosched() {
		now, err := fileTime()
		if err != nil {
			t.Fatal(err)
		}
		if now.After(began) {
			return
		}
	}
}

func TestVolatileStoreAfterACrashOfTheMachine(t *testing.T) {
	s := open(t, Config{Volatile: true})
	old := ingest(t, s, noise(300_000, 1), nil)
	tick(t)
	if err := s.syncAll(); err != nil {
		t.Fatal(err)
	}
	fresh := ingest(t, s, noise(300_000, 2), nil)
	b := noise(600_000, 3)
	p, err := s.Partial(metainfoOf(t, b))
	if err != nil {
		t.Fatal(err)
	}
	for i := range p.m.NumPieces() {
		fill(t, p, b, i)
	}
	swarmed, err := p.Commit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p.Close()

	// A crash of the process alone harms nothing: the next one takes over a lock that nobody holds.
	copied := t.TempDir()
	if err := os.CopyFS(copied, os.DirFS(s.cfg.Dir)); err != nil {
		t.Fatal(err)
	}
	again := open(t, Config{Dir: copied, Volatile: true})
	if !there(again, old) || !there(again, fresh) || !there(again, swarmed.Digest) {
		t.Error("a crash of the process has cost a blob")
	}

	// Times are not copied, so the crash of the machine happens to the store itself.
	s = crash(t, s)
	if !there(s, old) {
		t.Error("a blob that was synced is gone")
	}
	if there(s, fresh) || there(s, swarmed.Digest) {
		t.Error("a blob that may be torn is served")
	}
	if used, _ := s.Usage(); used != onDisk(t, s) {
		t.Errorf("%d bytes are counted, %d are on the disk", used, onDisk(t, s))
	}
	ingest(t, s, noise(300_000, 2), nil)
	tick(t)
	s = reopen(t, s) // an orderly end syncs
	reboot(t, s.cfg.Dir)
	if s = reopen(t, s); !there(s, fresh) || !there(s, old) {
		t.Error("an orderly end has cost a blob")
	}
}

// TestVolatileStoreDropsWhatWasWrittenBeforeASyncAndCommittedAfterIt: the times of the bytes alone don't say that they
// reached the disk.
func TestVolatileStoreDropsWhatWasWrittenBeforeASyncAndCommittedAfterIt(t *testing.T) {
	s := open(t, Config{Volatile: true})
	b := noise(10_000, 1)
	d := digest.FromBytes(b)
	u, err := s.NewUpload(UploadOptions{Size: int64(len(b)), Digest: d, Transient: true, NoMetainfo: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.Write(t.Context(), 0, bytes.NewReader(b)); err != nil {
		t.Fatal(err)
	}
	tick(t)
	if err := s.syncAll(); err != nil {
		t.Fatal(err)
	}
	if _, err := u.Commit(t.Context(), d, nil); err != nil {
		t.Fatal(err)
	}
	if s = crash(t, s); there(s, d) {
		t.Error("a blob that may be torn is served")
	}
}

func TestDurableStoreOverAVolatileOne(t *testing.T) {
	s := open(t, Config{Volatile: true})
	d := ingest(t, s, noise(1000, 1), nil)
	s.cfg.Volatile = false
	s = reopen(t, s)
	if !there(s, d) {
		t.Fatal("the blob is gone")
	}
	if err := os.WriteFile(filepath.Join(s.cfg.Dir, fileSynced), []byte("rubbish"), 0o644); err != nil {
		t.Fatal(err)
	}
	if s = reopen(t, s); there(s, d) {
		t.Error("nobody knows what is torn, and the blob is served")
	}
}

func TestVolatileStoreSyncsWhatWasCommitted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, err := os.MkdirTemp("", "store")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		s, err := Open(Config{Dir: dir, Volatile: true})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- s.RunSync(ctx) }()
		// Whether it has synced is seen by the file that says so, which is taken away before.
		synced := func(wait time.Duration) bool {
			if err := os.Remove(filepath.Join(dir, fileSynced)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Error(err)
			}
			time.Sleep(wait)
			synctest.Wait()
			_, err := os.Stat(filepath.Join(dir, fileSynced))
			return err == nil
		}
		synced(time.Minute) // what Open wrote
		if synced(time.Minute) {
			t.Error("synced although there was nothing")
		}
		if _, err := s.Ingest(ctx, metainfoOf(t, noise(1000, 1)).Digest, 1000, bytes.NewReader(noise(1000, 1)), nil); err != nil {
			t.Error(err)
		}
		if !synced(2*syncInterval) || s.dirty.Load() {
			t.Error("what was committed was not synced")
		}
		if synced(time.Minute) {
			t.Error("synced although there was nothing new")
		}
		cancel()
		if err := errors.Join(<-done, s.Close()); err != nil {
			t.Error(err)
		}
	})
}
