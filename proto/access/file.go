package access

import (
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// File is what a file says, read again when it changes. While what it says is not usable the last usable content
// stays, which is said in the log and by Err. It is safe for concurrent use.
type File[T any] struct {
	name  string
	log   *slog.Logger
	parse func(name string, b []byte) (T, error)

	mu      sync.Mutex
	current T
	stamp   os.FileInfo // of what was read last
	err     error       // why current is not what the file says
	looked  time.Time
	told    time.Time // when the log had err last
}

const (
	lookEvery = time.Second
	tellEvery = time.Minute
	maxFile   = 8 << 20
)

// OpenFile reads a file, which must be usable now.
func OpenFile[T any](name string, log *slog.Logger, parse func(name string, b []byte) (T, error)) (*File[T], error) {
	f := &File[T]{name: name, log: log, parse: parse}
	f.read()
	return f, f.err
}

// Get returns what the file says. It looks at the file at most once a second.
func (f *File[T]) Get() T {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.look()
	return f.current
}

// Err returns why Get does not return what the file says now, nil when it does.
func (f *File[T]) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.look()
	return f.err
}

// look reads the file where it has changed, or was not usable. The caller holds mu.
func (f *File[T]) look() {
	if time.Since(f.looked) < lookEvery {
		return
	}
	f.looked = time.Now()
	fi, err := os.Stat(f.name)
	if err == nil && f.err == nil && os.SameFile(fi, f.stamp) && fi.Size() == f.stamp.Size() && fi.ModTime().Equal(f.stamp.ModTime()) {
		return
	}
	had := f.err != nil
	f.read()
	switch {
	case f.err == nil:
		f.log.Info("a file was read again", "file", f.name)
	case !had || time.Since(f.told) > tellEvery:
		f.told = time.Now()
		f.log.Error("a file is not usable: what it said before stays", "file", f.name, "error", f.err)
	}
}

// read reads the file. The caller holds mu, or is the only one that has f.
func (f *File[T]) read() {
	stamp, err := os.Stat(f.name)
	if err != nil {
		f.err = err
		return
	}
	if stamp.Size() > maxFile {
		f.err = fmt.Errorf("%s has %d bytes, at most %d", f.name, stamp.Size(), maxFile)
		return
	}
	b, err := os.ReadFile(f.name)
	if err != nil {
		f.err = err
		return
	}
	v, err := f.parse(f.name, b)
	if f.err = err; err == nil {
		f.current, f.stamp = v, stamp
	}
}
