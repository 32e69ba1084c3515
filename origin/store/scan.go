package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"kraken/proto/blob"
)

// Open does not wait for the scan of the blobs that are there: it goes on in the background, and until it ends a lookup
// of a blob that was not found yet looks at the disk for this digest alone. What needs to know all blobs waits for
// Scanned: eviction, and the lists that others take for complete.

const (
	scanWorkers = 8
	// scanRetry is when the scan begins again after it failed. It goes on to be under way, so nothing is called missing
	// that it did not reach.
	scanRetry = 5 * time.Second
)

// scanState is how far the scan is.
type scanState struct {
	running atomic.Bool
	synced  atomic.Bool                // what the process before has left is durable
	done    chan struct{}              // closed when all was found
	seen    map[digest.Digest]struct{} // that were looked at, by the scan or for a lookup; under the store's lock
}

// Scanned is closed when all blobs that were there at the start are known.
func (s *Store) Scanned() <-chan struct{} { return s.scan.done }

// Scanning says that some blobs that are there may not be known yet. Lookups of single ones are right all the same.
func (s *Store) Scanning() bool { return s.scan.running.Load() }

// runScan scans until it succeeds or ctx is done.
func (s *Store) runScan(ctx context.Context) {
	began := time.Now()
	for {
		err := s.scanAll(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			break
		}
		s.log.Error("not all blobs of the store could be found; trying again", "in", scanRetry, "error", err)
		t := time.NewTimer(scanRetry)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
	s.mu.Lock()
	n := len(s.entries)
	s.scan.seen = nil
	s.scan.running.Store(false)
	s.mu.Unlock()
	s.log.Info("found all blobs of the store", "blobs", n, "took", time.Since(began).Round(time.Millisecond))
	if _, err := s.root.Stat(fileSynced); s.cfg.Volatile || err == nil {
		if err := s.syncAll(); err != nil { // RunSync tries again
			s.dirty.Store(true)
			s.log.Warn("what was cached lately would be dropped after a crash of the machine", "error", err)
		}
	}
	close(s.scan.done)
}

// scanAll looks at every blob's folder, several at once.
func (s *Store) scanAll(ctx context.Context) error {
	if err := s.syncLeft(); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(scanWorkers)
	algorithms, err := fs.ReadDir(s.root.FS(), "blobs")
	if err != nil {
		return err
	}
	for _, a := range algorithms {
		if !a.IsDir() {
			continue
		}
		shards, err := fs.ReadDir(s.root.FS(), path.Join("blobs", a.Name()))
		if err != nil {
			return errors.Join(err, g.Wait())
		}
		for _, shard := range shards {
			if shard.IsDir() {
				g.Go(func() error { return s.scanShard(ctx, a.Name(), shard.Name()) })
			}
		}
	}
	return g.Wait()
}

func (s *Store) scanShard(ctx context.Context, algorithm, shard string) error {
	name := path.Join("blobs", algorithm, shard)
	root, err := s.root.Sub(name)
	if err != nil {
		return err
	}
	defer root.Close()
	es, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return err
	}
	for _, e := range es {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if !e.IsDir() {
			continue
		}
		d, err := blob.ParseDigest(algorithm + ":" + e.Name())
		if err != nil || path.Dir(blobDir(d)) != name {
			s.log.Warn("a foreign folder in the store is left alone", "path", path.Join(name, e.Name()))
			continue
		}
		if err := s.visit(d, root); err != nil {
			return err
		}
	}
	return nil
}

// find sees to it that d is known if it is there. An error is no answer; ErrNotFound is none of them.
func (s *Store) find(d digest.Digest) error {
	if !s.scan.running.Load() || s.wasSeen(d) {
		return nil
	}
	if _, err := blob.ParseDigest(d.String()); err != nil {
		return nil // what can't be there
	}
	root, err := s.root.Sub(path.Dir(blobDir(d)))
	if errors.Is(err, fs.ErrNotExist) {
		root = nil
	} else if err != nil {
		return fmt.Errorf("look for blob %s on the disk: %w", d, err)
	} else {
		defer root.Close()
		if err := s.syncFound(path.Dir(blobDir(d))); err != nil { // those above are: see prepare
			return fmt.Errorf("look for blob %s on the disk: %w", d, err)
		}
	}
	if err := s.visit(d, root); err != nil {
		return fmt.Errorf("look for blob %s on the disk: %w", d, err)
	}
	return nil
}

// syncLeft makes durable, by one call, all that the process before has left: it may have ended before it did, and what
// the scan finds counts.
func (s *Store) syncLeft() error {
	if s.cfg.Volatile || s.scan.synced.Load() {
		return nil
	}
	if err := s.root.SyncAll(); err != nil {
		return fmt.Errorf("sync %s: %w", s.cfg.Dir, err)
	}
	s.scan.synced.Store(true)
	return nil
}

// syncFound makes what is in a folder durable that a lookup has found: it does not wait for syncLeft, which may write
// what others have left in the page cache, too.
func (s *Store) syncFound(folder string) error {
	if s.scan.synced.Load() {
		return nil
	}
	return s.syncDir(folder)
}

func (s *Store) wasSeen(d digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, seen := s.scan.seen[d]
	return seen || s.scan.seen == nil
}

// visit looks at a blob's folder in the folder above it, nil when that is not there. It does so once; whoever changes
// the folder of a blob has called find before.
func (s *Store) visit(d digest.Digest, shard FS) error {
	if s.wasSeen(d) {
		return nil
	}
	defer s.claim("scan " + d.String())()
	if s.wasSeen(d) {
		return nil
	}
	var e *entry
	var disk int64
	if shard != nil {
		var err error
		if e, disk, err = s.examine(d, shard); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.scan.seen[d] = struct{}{}
	s.used += disk
	if e != nil {
		s.entries[d] = e
	}
	return nil
}

// examine reads a blob's folder: its entry when it is whole, and what it takes on disk. What a crash left half made is
// removed.
func (s *Store) examine(d digest.Digest, shard FS) (*entry, int64, error) {
	folder, files, err := readFolder(shard, d.Encoded())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	data := files[fileData]
	if data == nil { // somebody else has removed it: what a commit makes visible has both
		size, ok := s.knownSize(d, files)
		if !ok {
			size = SizeUnknown
		}
		if files[fileMarker] != nil {
			s.lost.Add(1)
			s.log.Error("a blob that is owed to the bucket has lost its file", "digest", d)
		}
		return nil, 0, s.loseFolder(d, size, files)
	}
	if files[fileMarker] != nil || files[filePieces] != nil { // it may have been made, and not synced
		if err := s.syncFound(blobDir(d)); err != nil {
			return nil, 0, err
		}
	}
	if files[filePieces] != nil {
		return nil, occupied(data), nil // partial; opened when somebody wants it
	}
	if files[fileSession] != nil { // the crash came right after the commit
		if err := s.remove(blobFile(d, fileSession)); err != nil {
			return nil, 0, err
		}
		delete(files, fileSession)
	}
	if s.torn(folder, data) {
		s.log.Warn("a blob that a crash of the machine may have torn is removed", "digest", d)
		return nil, 0, s.removeAll(blobDir(d))
	}
	if want, ok := s.knownSize(d, files); ok && want != data.Size() {
		s.lost.Add(1)
		s.log.Error("a blob whose file has another length than its metainfo says is removed", "digest", d, "size", data.Size(), "want", want)
		return nil, 0, s.loseFolder(d, want, files)
	}
	e := &entry{size: data.Size(), disk: allocated(folder), access: data.ModTime(), marked: files[fileMarker] != nil}
	for _, fi := range files {
		e.disk += allocated(fi)
	}
	if e.marked {
		if m, err := s.readMarker(d); err == nil {
			e.marker = &m
		} else {
			s.log.Error("what a blob owes to the bucket can't be read", "digest", d, "error", err)
		}
	}
	return e, e.disk, nil
}

// readFolder describes a folder and the files in it, by name.
func readFolder(parent FS, name string) (folder fs.FileInfo, files map[string]fs.FileInfo, err error) {
	f, err := parent.Open(name)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	if folder, err = f.Stat(); err != nil {
		return nil, nil, err
	}
	es, err := f.ReadDir(-1)
	if err != nil {
		return nil, nil, err
	}
	files = make(map[string]fs.FileInfo, len(es))
	for _, e := range es {
		fi, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		files[e.Name()] = fi
	}
	return folder, files, nil
}

// knownSize is the size that the metainfo beside a blob says, read from its first bytes.
func (s *Store) knownSize(d digest.Digest, files map[string]fs.FileInfo) (n int64, ok bool) {
	if files[fileMetainfo] == nil {
		return 0, false
	}
	f, err := s.root.Open(blobFile(d, fileMetainfo))
	if err != nil {
		return 0, false
	}
	defer f.Close()
	head := headBuffers.Get().(*[]byte)
	defer headBuffers.Put(head)
	k, err := f.ReadAt(*head, 0)
	if k == 0 && err != nil {
		return 0, false
	}
	return metainfoLength((*head)[:k])
}

// metainfoLength reads the length of the blob from the beginning of its metainfo. A torn one says nothing: it is
// computed again.
func metainfoLength(head []byte) (n int64, ok bool) {
	rest, ok := bytes.CutPrefix(head, []byte("d4:infod6:lengthi"))
	if !ok {
		return 0, false
	}
	digits, _, ok := bytes.Cut(rest, []byte("e4:name"))
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseInt(string(digits), 10, 64)
	return n, err == nil
}

var headBuffers = sync.Pool{New: func() any { b := make([]byte, 64); return &b }}
