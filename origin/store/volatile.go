package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A volatile store (an agent's) holds no only copy, so its commits don't wait for the disk: syncing costs several
// milliseconds a blob. A crash of the process harms nothing, since the page cache survives it. A crash of the machine
// may tear what was committed since the last syncfs, so the time of that is kept with the boot id in the file `synced`,
// and the next Open drops what is newer.

const (
	fileSynced   = "synced"
	syncInterval = 5 * time.Second
)

// syncFile is f.Sync where the store is durable.
func (s *Store) syncFile(f *os.File) error {
	if s.cfg.Volatile {
		s.dirty.Store(true)
		return nil
	}
	return s.fsync(f)
}

// RunSync syncs what was committed, now and then, until ctx is done. Only a volatile store needs it.
func (s *Store) RunSync(ctx context.Context) error {
	t := time.NewTicker(syncInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil // Close syncs once more
		case <-t.C:
		}
		if !s.dirty.Swap(false) {
			continue
		}
		if err := s.syncAll(); err != nil {
			s.dirty.Store(true)
			s.log.Warn("what was cached lately would be dropped after a crash of the machine", "error", err)
		}
	}
}

// syncAll makes all durable, and says so on the disk.
func (s *Store) syncAll() error {
	at, err := fileTime()
	if err != nil {
		return fmt.Errorf("sync %s: %w", s.cfg.Dir, err)
	}
	if err := s.root.SyncAll(); err != nil {
		return fmt.Errorf("sync %s: %w", s.cfg.Dir, err)
	}
	if s.scan.running.Load() { // what may be torn and was not looked at yet must not count as synced
		s.dirty.Store(true)
		return nil
	}
	// An older one costs more blobs, and lets no wrong one through.
	return s.replaceFile(fileSynced, fmt.Appendf(nil, "%s %d\n", s.root.Boot(), at.UnixNano()), s.root.Sync)
}

// fileTime is what a file that is written now gets as its time: the kernel takes that from a clock that moves with its
// tick and is some milliseconds behind time.Now. By that one, what is committed right after a sync would seem older
// than it.
func fileTime() (time.Time, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &ts); err != nil {
		return time.Time{}, fmt.Errorf("read the clock of file times: %w", err)
	}
	return time.Unix(ts.Unix()), nil
}

// findTorn decides from what time on the last crash of the machine may have torn blobs; zero when there was none.
func (s *Store) findTorn() error {
	b, err := s.root.ReadFile(fileSynced)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // never volatile
	}
	if err != nil {
		return err
	}
	boot, text, _ := strings.Cut(strings.TrimSpace(string(b)), " ")
	if boot == s.root.Boot() && boot != "" {
		return nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		n = 1 // not to be read: all may be torn
	}
	s.tornSince = time.Unix(0, n)
	return nil
}

// torn says whether a whole blob may not be what was committed. Every commit changes its folder, and file systems keep
// the order of that and of the times of its files.
func (s *Store) torn(folder, data fs.FileInfo) bool {
	return !s.tornSince.IsZero() && (!folder.ModTime().Before(s.tornSince) || !data.ModTime().Before(s.tornSince))
}
