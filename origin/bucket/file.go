package bucket

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/opencontainers/go-digest"
	"gocloud.dev/blob/fileblob"
)

// folder is a bucket in a folder. The library's driver neither syncs what it writes nor lists in the order of keys.
type folder struct {
	*cloud
	dir  string
	mode fs.FileMode

	mu     sync.Mutex
	synced map[string]bool // folders whose names are durable; nobody removes a bucket's folders while it is used
}

// maxSynced bounds the memory of a bucket's folders; what is forgotten is only synced once more.
const maxSynced = 1 << 14

func checkFile(u *url.URL) error {
	if u.Host != "" || !filepath.IsAbs(u.Path) {
		return fmt.Errorf("%s: want file:///absolute/folder", u)
	}
	for k := range u.Query() {
		if k != "mode" {
			return fmt.Errorf("unknown parameter %q: want mode", k)
		}
	}
	if i, err := os.Stat(u.Path); err == nil && !i.IsDir() {
		return fmt.Errorf("%s is a file: want a folder", u.Path)
	}
	_, err := fileMode(u)
	return err
}

// fileMode is the mode of a bucket's files, 0600 unless the URL says otherwise.
func fileMode(u *url.URL) (fs.FileMode, error) {
	text := u.Query().Get("mode")
	if text == "" {
		return 0o600, nil
	}
	mode, err := strconv.ParseUint(text, 8, 32)
	if err != nil || mode&^0o666 != 0 || mode&0o600 != 0o600 {
		return 0, fmt.Errorf("%s: mode %.20q: want e.g. 0640, which its owner may read and write", u, text)
	}
	return fs.FileMode(mode), nil
}

// folderMode lets whoever may read, or write, files of a mode do so in their folder.
func folderMode(file fs.FileMode) fs.FileMode { return 0o700 | (file&0o044)>>2 | file&0o066 }

func openFile(name string, u *url.URL) (Bucket, error) {
	mode, err := fileMode(u)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(u.Path, folderMode(mode)); err != nil {
		return nil, err
	}
	b, err := fileblob.OpenBucket(u.Path, &fileblob.Options{NoTempDir: true, DirFileMode: folderMode(mode), Metadata: fileblob.MetadataDontWrite})
	if err != nil {
		return nil, err
	}
	return &folder{cloud: &cloud{b: b, name: name, exists: func(context.Context) error {
		if _, err := os.Stat(u.Path); errors.Is(err, fs.ErrNotExist) { // not mounted, say
			return ErrMissing
		}
		return nil
	}}, dir: u.Path, mode: mode}, nil
}

func (b *folder) Put(ctx context.Context, key string, r io.Reader) error {
	if err := b.cloud.Put(ctx, key, r); err != nil {
		return err
	}
	// The library makes files that all may read, as far as the umask lets it.
	if err := os.Chmod(filepath.Join(b.dir, filepath.FromSlash(key)), b.mode); err != nil {
		return b.fail("chmod", key, err)
	}
	if c, ok := r.(*Checked); ok {
		b.keepDigest(key, c.Digest())
	}
	if err := b.sync(key); err != nil {
		return b.fail("sync", key, err)
	}
	return nil
}

// digestAttribute is the extended attribute of a file that tells its digest. It goes with the file: what is written in
// its place has none, or its own.
const digestAttribute = "user.kraken.digest"

// keepDigest writes a digest beside the bytes. Where the file system can't, the bytes are read when somebody asks.
func (b *folder) keepDigest(key string, d digest.Digest) {
	_ = syscall.Setxattr(filepath.Join(b.dir, filepath.FromSlash(key)), digestAttribute, []byte(d), 0)
}

// Stat implements Bucket.
func (b *folder) Stat(ctx context.Context, key string) (Object, error) {
	o, err := b.cloud.Stat(ctx, key)
	if err != nil {
		return o, err
	}
	var buf [256]byte
	if n, err := syscall.Getxattr(filepath.Join(b.dir, filepath.FromSlash(key)), digestAttribute, buf[:]); err == nil {
		o.Digest = digest.Digest(buf[:n])
	}
	return o, nil
}

// sync makes a file and the names of all folders down to it durable: fileblob renames without a sync. A folder that was
// seen to be durable is not synced again for its own name.
func (b *folder) sync(key string) error {
	p := filepath.Join(b.dir, filepath.FromSlash(key))
	if err := syncFile(p); err != nil {
		return err
	}
	var fresh []string
	for p != b.dir {
		p = filepath.Dir(p)
		if err := syncFile(p); err != nil {
			return err
		}
		b.mu.Lock()
		known := b.synced[p]
		b.mu.Unlock()
		if known {
			break
		}
		fresh = append(fresh, p)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.synced == nil || len(b.synced)+len(fresh) > maxSynced {
		b.synced = map[string]bool{}
	}
	for _, p := range fresh {
		b.synced[p] = true
	}
	return nil
}

func syncFile(p string) error {
	f, err := os.Open(p)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func (b *folder) List(ctx context.Context, prefix, after string, fn func(Object) error) error {
	if _, err := os.Stat(b.dir); err != nil { // a folder that is not mounted is not an empty one
		return b.fail("list", prefix, fmt.Errorf("%s: %w", b.dir, errUnmounted))
	}
	return b.walk(ctx, path.Dir(prefix+"x"), span{prefix, after}, fn)
}

var errUnmounted = errors.New("the folder is not there")

// span is what of a bucket is listed: the keys with a prefix that are greater than after.
type span struct{ prefix, after string }

// reaches reports whether a folder, which ends with a slash, may have keys of the span.
func (s span) reaches(folder string) bool {
	if !strings.HasPrefix(folder, s.prefix) && !strings.HasPrefix(s.prefix, folder) {
		return false
	}
	return folder > s.after || strings.HasPrefix(s.after, folder)
}

// walk lists a folder in the order of keys. fileblob's own listing visits a/ before a-b/, repeats keys from page to
// page for that, and skips what it can't read.
func (b *folder) walk(ctx context.Context, dir string, s span, fn func(Object) error) error {
	es, err := os.ReadDir(filepath.Join(b.dir, filepath.FromSlash(dir)))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // gone since it was seen, or nothing has this prefix
	}
	if err != nil {
		return b.fail("list", dir, err)
	}
	keys := make([]string, len(es))
	for i, e := range es {
		if keys[i] = path.Join(dir, e.Name()); e.IsDir() {
			keys[i] += "/"
		}
	}
	slices.Sort(keys)
	for _, key := range keys {
		if err := ctx.Err(); err != nil {
			return b.fail("list", dir, err)
		}
		sub, isDir := strings.CutSuffix(key, "/")
		switch {
		case isDir && s.reaches(key):
			if err := b.walk(ctx, sub, s, fn); err != nil {
				return err
			}
		case !isDir && strings.HasPrefix(key, s.prefix) && key > s.after:
			fi, err := os.Stat(filepath.Join(b.dir, filepath.FromSlash(key)))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return b.fail("list", key, err)
			}
			if err := fn(Object{Key: key, Size: fi.Size()}); err != nil {
				return err
			}
		}
	}
	return nil
}
