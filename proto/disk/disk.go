// Package disk says what a file system has left, and which errors are those of one that is full. It knows nothing of
// what is kept there.
package disk

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"syscall"
)

// Space is what a file system has left for others than root, in bytes.
type Space struct {
	Dir  string // where it is mounted
	Free int64
	Size int64
}

// reserve is how many bytes are to stay free, of a file system that is not small.
const reserve = 64 << 20

// Of returns the space of the file system that has dir.
func Of(dir string) (Space, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return Space{}, fmt.Errorf("free space of %s: %w", dir, err)
	}
	bytes := func(blocks uint64) int64 { return int64(min(blocks, math.MaxInt64/uint64(st.Bsize))) * st.Bsize }
	return Space{Mount(dir), bytes(st.Bavail), bytes(st.Blocks)}, nil
}

// Mount returns where the file system that has dir is mounted, dir itself where that can't be known.
func Mount(dir string) string {
	at, err := filepath.Abs(dir)
	if err != nil {
		return dir
	}
	if real, err := filepath.EvalSymlinks(at); err == nil {
		at = real
	}
	device, ok := deviceOf(at)
	for ok && at != "/" {
		above := filepath.Dir(at)
		if d, known := deviceOf(above); !known || d != device {
			break
		}
		at = above
	}
	return at
}

func deviceOf(dir string) (device uint64, ok bool) {
	fi, err := os.Stat(dir)
	if err != nil {
		return 0, false
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return uint64(st.Dev), true
}

// String names the file system and its free bytes, for operators.
func (s Space) String() string {
	return fmt.Sprintf("the file system at %s has %d bytes free of %d", s.Dir, s.Free, s.Size)
}

// Reserve is how many bytes of it are to stay free: 64 MiB, or a twentieth where that is less. Less is nearly full.
func (s Space) Reserve() int64 { return min(reserve, s.Size/20) }

// Check returns a *FullError where less than the reserve is free.
func (s Space) Check() error {
	if s.Free >= s.Reserve() {
		return nil
	}
	return &FullError{Space: s, Err: ErrLow}
}

// ErrLow is that of a file system only its reserve is left.
var ErrLow = errors.New("the disk is full, or nearly")

// Full reports whether err is of a file system, or a quota, that has no room left.
func Full(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// FullError is a write that found no room. Its text names the file system, which is for operators: clients are told Err
// alone (transport.Public).
type FullError struct {
	Space Space
	Err   error
}

// Error implements error.
func (e *FullError) Error() string { return fmt.Sprintf("%v (%s)", e.Err, e.Space) }

// Unwrap returns Err.
func (e *FullError) Unwrap() error { return e.Err }
