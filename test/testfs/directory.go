package testfs

import (
	"crypto/md5"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/google/uuid"
	"github.com/johannesboyne/gofakes3"
)

// directory keeps each object as a file below bucket/key. Objects become visible whole, by renaming, and survive a
// restart. It keeps no versions. User metadata is an extended attribute of the file, and lost where the file system has
// none.
type directory struct{ root *os.Root }

const (
	objectsDir = "objects" // objects/<bucket>/<key>
	partsDir   = "parts"   // parts/<upload>/<number>, and files on their way
)

func newDirectory(dir string) (*directory, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	for _, d := range []string{objectsDir, partsDir} {
		if err := root.MkdirAll(d, 0o700); err != nil {
			return nil, errors.Join(err, root.Close())
		}
	}
	return &directory{root}, nil
}

func (d *directory) file(bucket, key string) (string, error) {
	p := path.Join(objectsDir, bucket, key)
	if !filepath.IsLocal(path.Join(bucket, key)) || strings.HasSuffix(key, "/") || path.Join(bucket, key) != bucket+"/"+key {
		return "", gofakes3.ErrorMessagef(gofakes3.ErrInvalidArgument, "key %q can't be a file", key)
	}
	return p, nil
}

func (d *directory) ListBuckets() ([]gofakes3.BucketInfo, error) {
	es, err := fs.ReadDir(d.root.FS(), objectsDir)
	if err != nil {
		return nil, err
	}
	var out []gofakes3.BucketInfo
	for _, e := range es {
		fi, err := e.Info()
		if err != nil {
			return nil, err
		}
		out = append(out, gofakes3.BucketInfo{Name: e.Name(), CreationDate: gofakes3.NewContentTime(fi.ModTime())})
	}
	return out, nil
}

func (d *directory) ListBucket(bucket string, prefix *gofakes3.Prefix, page gofakes3.ListBucketPage) (*gofakes3.ObjectList, error) {
	if ok, err := d.BucketExists(bucket); err != nil || !ok {
		return nil, errors.Join(err, gofakes3.BucketNotFound(bucket))
	}
	base := path.Join(objectsDir, bucket)
	within := ""
	if prefix != nil && prefix.HasPrefix {
		if within = path.Dir(prefix.Prefix+"x") + "/"; within == "./" {
			within = ""
		}
	}
	after := ""
	if page.HasMarker {
		after = page.Marker
	}
	out, n := gofakes3.NewObjectList(), int64(0)
	err := d.walk(base, within, after, func(key string, e fs.DirEntry) error {
		var m gofakes3.PrefixMatch
		if prefix != nil && !prefix.Match(key, &m) {
			return nil
		}
		at := key
		if m.CommonPrefix {
			at = m.MatchedPart
		}
		if at <= after {
			return nil
		}
		fi, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if page.MaxKeys > 0 && n >= page.MaxKeys {
			out.IsTruncated = true
			return fs.SkipAll
		}
		out.NextMarker = at
		if m.CommonPrefix {
			before := len(out.CommonPrefixes)
			out.AddPrefix(m.MatchedPart)
			n += int64(len(out.CommonPrefixes) - before)
			return nil
		}
		out.Add(&gofakes3.Content{Key: key, LastModified: gofakes3.NewContentTime(fi.ModTime()), Size: fi.Size(), ETag: gofakes3.FormatETag(stamp(fi))})
		n++
		return nil
	})
	if err != nil && !errors.Is(err, fs.SkipAll) {
		return nil, err
	}
	if !out.IsTruncated {
		out.NextMarker = ""
	}
	return out, nil
}

// walk calls fn for the files below a folder in the order of their keys, from the first one after a key on, and reads
// no folder that has none: a page costs what is on it, however many objects there are. Within is a folder's key, with a
// slash at its end, or empty.
func (d *directory) walk(base, within, after string, fn func(key string, e fs.DirEntry) error) error {
	es, err := fs.ReadDir(d.root.FS(), path.Join(base, within))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	order := func(e fs.DirEntry) string { // a folder's keys go on with a slash
		if e.IsDir() {
			return e.Name() + "/"
		}
		return e.Name()
	}
	slices.SortFunc(es, func(a, b fs.DirEntry) int { return strings.Compare(order(a), order(b)) })
	for _, e := range es {
		key := within + order(e)
		switch {
		case !e.IsDir():
			if key > after {
				err = fn(key, e)
			}
		case key > after || strings.HasPrefix(after, key):
			err = d.walk(base, key, after, fn)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// stamp is an ETag that changes with the object. It is no MD5, which S3 doesn't promise either.
func stamp(fi fs.FileInfo) []byte {
	sum := md5.Sum(fmt.Appendf(nil, "%s %d %d", fi.Name(), fi.Size(), fi.ModTime().UnixNano()))
	return sum[:]
}

func (d *directory) CreateBucket(name string) error {
	err := d.root.Mkdir(path.Join(objectsDir, name), 0o700)
	if errors.Is(err, fs.ErrExist) {
		return gofakes3.ResourceError(gofakes3.ErrBucketAlreadyExists, name)
	}
	return err
}

func (d *directory) BucketExists(name string) (bool, error) {
	_, err := d.root.Stat(path.Join(objectsDir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

func (d *directory) DeleteBucket(name string) error {
	return d.root.Remove(path.Join(objectsDir, name))
}

func (d *directory) ForceDeleteBucket(name string) error {
	return d.root.RemoveAll(path.Join(objectsDir, name))
}

func (d *directory) GetObject(bucket, key string, rr *gofakes3.ObjectRangeRequest) (*gofakes3.Object, error) {
	p, err := d.file(bucket, key)
	if err != nil {
		return nil, err
	}
	f, err := d.root.Open(p)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNotDir) {
		return nil, gofakes3.KeyNotFound(key)
	}
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && fi.IsDir() {
		err = gofakes3.KeyNotFound(key)
	}
	var r *gofakes3.ObjectRange
	if err == nil {
		r, err = rr.Range(fi.Size())
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	meta := metaOf(f)
	meta["Last-Modified"] = fi.ModTime().UTC().Format(http.TimeFormat)
	o := &gofakes3.Object{Name: key, Metadata: meta, Size: fi.Size(), Contents: f, Hash: stamp(fi), Range: r}
	if r != nil {
		o.Contents = section{io.NewSectionReader(f, r.Start, r.Length), f}
	}
	return o, nil
}

type section struct {
	io.Reader
	io.Closer
}

func (d *directory) HeadObject(bucket, key string) (*gofakes3.Object, error) {
	o, err := d.GetObject(bucket, key, nil)
	if err != nil {
		return nil, err
	}
	err = o.Contents.Close()
	o.Contents = io.NopCloser(strings.NewReader(""))
	return o, err
}

func (d *directory) DeleteObject(bucket, key string) (gofakes3.ObjectDeleteResult, error) {
	p, err := d.file(bucket, key)
	if err != nil {
		return gofakes3.ObjectDeleteResult{}, err
	}
	if err := d.root.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return gofakes3.ObjectDeleteResult{}, err
	}
	for dir := path.Dir(p); strings.Count(dir, "/") > 1; dir = path.Dir(dir) {
		if d.root.Remove(dir) != nil {
			break // not empty
		}
	}
	return gofakes3.ObjectDeleteResult{}, nil
}

func (d *directory) PutObject(bucket, key string, meta map[string]string, input io.Reader, size int64, cond *gofakes3.PutConditions) (gofakes3.PutObjectResult, error) {
	p, err := d.file(bucket, key)
	if err != nil {
		return gofakes3.PutObjectResult{}, err
	}
	if cond != nil {
		info := gofakes3.ConditionalObjectInfo{}
		if o, err := d.HeadObject(bucket, key); err == nil {
			info = gofakes3.ConditionalObjectInfo{Exists: true, Hash: o.Hash}
		}
		if err := gofakes3.CheckPutConditions(cond, &info); err != nil {
			return gofakes3.PutObjectResult{}, err
		}
	}
	return gofakes3.PutObjectResult{}, d.write(p, size, input, meta)
}

// write makes a file visible whole.
func (d *directory) write(p string, size int64, r io.Reader, meta map[string]string) error {
	tmp := path.Join(partsDir, "put-"+uuid.NewString())
	f, err := d.root.Create(tmp)
	if err != nil {
		return err
	}
	n, err := io.Copy(f, r)
	if err == nil && size >= 0 && n != size {
		err = gofakes3.ErrIncompleteBody
	}
	if err == nil {
		keepMeta(f, meta)
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = d.publish(tmp, p)
	}
	if err != nil {
		return errors.Join(err, d.root.RemoveAll(tmp))
	}
	return nil
}

const (
	metaAttribute = "user.testfs.meta"
	metaFile      = "meta" // of a multipart upload
	metaPrefix    = "X-Amz-Meta-"
)

// keepMeta keeps the user's metadata of an object with its file.
func keepMeta(f *os.File, meta map[string]string) {
	users := map[string]string{}
	for k, v := range meta {
		if strings.HasPrefix(http.CanonicalHeaderKey(k), metaPrefix) {
			users[k] = v
		}
	}
	if b, err := json.Marshal(users); err == nil && len(users) > 0 {
		_ = syscall.Setxattr(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), metaAttribute, b, 0)
	}
}

// metaOf is what keepMeta kept.
func metaOf(f *os.File) map[string]string {
	meta := map[string]string{}
	b := make([]byte, 4096)
	if n, err := syscall.Getxattr(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), metaAttribute, b); err == nil {
		_ = json.Unmarshal(b[:n], &meta)
	}
	return meta
}

// publish renames, again when a delete has just removed the folder.
func (d *directory) publish(tmp, p string) error {
	for try := 0; ; try++ {
		if err := d.root.MkdirAll(path.Dir(p), 0o700); err != nil && try > 3 {
			return err
		}
		err := d.root.Rename(tmp, p)
		if err == nil || !errors.Is(err, fs.ErrNotExist) || try > 3 {
			return err
		}
	}
}

func (d *directory) DeleteMulti(bucket string, keys ...string) (out gofakes3.MultiDeleteResult, err error) {
	for _, k := range keys {
		if _, err := d.DeleteObject(bucket, k); err != nil {
			out.Error = append(out.Error, gofakes3.ErrorResult{Key: k, Code: gofakes3.ErrInternal, Message: err.Error()})
			continue
		}
		out.Deleted = append(out.Deleted, gofakes3.ObjectID{Key: k})
	}
	return out, nil
}

func (d *directory) CopyObject(srcBucket, srcKey, dstBucket, dstKey string, meta map[string]string) (gofakes3.CopyObjectResult, error) {
	return gofakes3.CopyObject(d, srcBucket, srcKey, dstBucket, dstKey, meta)
}

// Multipart uploads are folders of parts, so that a large object never is in memory.

func (d *directory) upload(id gofakes3.UploadID) (string, error) {
	if _, err := uuid.Parse(string(id)); err != nil {
		return "", gofakes3.ErrNoSuchUpload
	}
	dir := path.Join(partsDir, string(id))
	if _, err := d.root.Stat(dir); err != nil {
		return "", gofakes3.ErrNoSuchUpload
	}
	return dir, nil
}

func (d *directory) CreateMultipartUpload(bucket, key string, meta map[string]string) (gofakes3.UploadID, error) {
	if _, err := d.file(bucket, key); err != nil {
		return "", err
	}
	id := uuid.NewString()
	err := d.root.Mkdir(path.Join(partsDir, id), 0o700)
	if err == nil {
		var b []byte
		if b, err = json.Marshal(meta); err == nil {
			err = d.root.WriteFile(path.Join(partsDir, id, metaFile), b, 0o644)
		}
	}
	return gofakes3.UploadID(id), err
}

func (d *directory) UploadPart(_, _ string, id gofakes3.UploadID, number int, length int64, input io.Reader) (string, error) {
	dir, err := d.upload(id)
	if err != nil {
		return "", err
	}
	h := md5.New()
	if err := d.write(path.Join(dir, strconv.Itoa(number)), -1, io.TeeReader(input, h), nil); err != nil {
		return "", err
	}
	return `"` + hex.EncodeToString(h.Sum(nil)) + `"`, nil
}

func (d *directory) CompleteMultipartUpload(bucket, key string, id gofakes3.UploadID, input *gofakes3.CompleteMultipartUploadRequest) (gofakes3.VersionID, string, error) {
	dir, err := d.upload(id)
	if err != nil {
		return "", "", err
	}
	p, err := d.file(bucket, key)
	if err != nil {
		return "", "", err
	}
	parts := slices.Clone(input.Parts)
	slices.SortFunc(parts, func(a, b gofakes3.CompletedPart) int { return a.PartNumber - b.PartNumber })
	r := &joined{d: d, dir: dir, parts: parts}
	defer r.close()
	meta := map[string]string{}
	if b, err := d.root.ReadFile(path.Join(dir, metaFile)); err == nil {
		_ = json.Unmarshal(b, &meta)
	}
	if err := d.write(p, -1, r, meta); err != nil {
		return "", "", err
	}
	fi, err := d.root.Stat(p)
	if err != nil {
		return "", "", err
	}
	return "", gofakes3.FormatETag(stamp(fi)), d.root.RemoveAll(dir)
}

// joined reads parts one after the other.
type joined struct {
	d     *directory
	dir   string
	parts []gofakes3.CompletedPart
	f     *os.File
}

func (j *joined) Read(b []byte) (int, error) {
	for {
		if j.f == nil {
			if len(j.parts) == 0 {
				return 0, io.EOF
			}
			f, err := j.d.root.Open(path.Join(j.dir, strconv.Itoa(j.parts[0].PartNumber)))
			if err != nil {
				return 0, gofakes3.ErrInvalidPart
			}
			j.f, j.parts = f, j.parts[1:]
		}
		n, err := j.f.Read(b)
		if err != io.EOF {
			return n, err
		}
		j.close()
		if n > 0 {
			return n, nil
		}
	}
}

func (j *joined) close() {
	if j.f != nil {
		j.f.Close()
		j.f = nil
	}
}

func (d *directory) AbortMultipartUpload(_, _ string, id gofakes3.UploadID) error {
	dir, err := d.upload(id)
	if err != nil {
		return err
	}
	return d.root.RemoveAll(dir)
}

func (d *directory) ListMultipartUploads(string, *gofakes3.UploadListMarker, gofakes3.Prefix, int64) (*gofakes3.ListMultipartUploadsResult, error) {
	return nil, gofakes3.ErrNotImplemented
}

func (d *directory) ListParts(string, string, gofakes3.UploadID, int, int64) (*gofakes3.ListMultipartUploadPartsResult, error) {
	return nil, gofakes3.ErrNotImplemented
}
