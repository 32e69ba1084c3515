package sim

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// disk is what an origin's store keeps. It lies in real files, and remembers beside them what was synced: at a crash of
// the machine the rest is kept, half kept or lost, as the seed decides.
//
// The model of the file system: names change in operations, each of which touches one or two folders. A sync of a
// folder makes all operations on it durable, and those on which they depend. After a crash each folder has the durable
// ones and some of the others, in their order, none without the ones before it. A file has what was synced, and of the
// rest any pages of 4 KiB, zeros where there was nothing before; its length is one of those that it had.
type disk struct {
	base string
	rnd  *rand.Rand

	mu     sync.Mutex
	slow   time.Duration // is added to each sync
	all    time.Duration // is added to each sync of all
	gen    int
	dir    string // of this generation
	root   *inode // names as the process sees them
	byIno  map[uint64]*inode
	ops    []operation // not durable yet, oldest first
	next   int
	rotten map[string]bool // hex of blobs that a bit was flipped in

	boots   int // of the machine
	calls   int // of the file system that change or sync something
	crashAt int // the call at which everything fails, 0 for never
	failAt  int // the call that fails alone, 0 for none
}

// inode is a file or folder: of a file what was synced of its content, of a folder its durable names.
type inode struct {
	id       int
	folder   bool
	names    map[string]*inode // now
	durable  map[string]*inode
	content  []byte // synced
	synced   bool   // ever
	parent   *inode // now; nil when it was removed
	name     string
	unlinked []byte // what it had when it was removed without having been synced
}

// operation is one change of names. Of a rename all four are set; else only to (a new name) or only from (a removed
// one).
type operation struct {
	node             *inode
	from, to         *inode
	fromName, toName string
}

func newDisk(base string, seed uint64) (*disk, error) {
	d := &disk{base: base, rnd: rand.New(rand.NewPCG(seed, 2)), rotten: map[string]bool{}}
	d.dir = filepath.Join(base, "0")
	return d, errors.Join(os.MkdirAll(d.dir, 0o700), d.adopt())
}

// adopt takes what lies in the folder for durable.
func (d *disk) adopt() error {
	d.byIno, d.ops = map[uint64]*inode{}, nil
	d.root = d.newInode(true)
	nodes := map[string]*inode{".": d.root}
	return filepath.WalkDir(d.dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(d.dir, name)
		if err != nil || rel == "lock" {
			return err
		}
		n := d.root
		if rel != "." {
			n = d.newInode(e.IsDir())
			nodes[rel] = n
			p := nodes[path.Dir(rel)]
			n.parent, n.name = p, path.Base(rel)
			p.names[n.name], p.durable[n.name] = n, n
		}
		if !e.IsDir() {
			if n.content, err = os.ReadFile(name); err != nil {
				return err
			}
		}
		n.synced = true
		return d.track(name, n)
	})
}

func (d *disk) newInode(folder bool) *inode {
	d.next++
	n := &inode{id: d.next, folder: folder}
	if folder {
		n.names, n.durable = map[string]*inode{}, map[string]*inode{}
	}
	return n
}

func (d *disk) track(file string, n *inode) error {
	fi, err := os.Lstat(file)
	if err != nil {
		return err
	}
	d.byIno[fi.Sys().(*syscall.Stat_t).Ino] = n
	return nil
}

// find is the file or folder of a name, nil where there is none. The lock is held.
func (d *disk) find(name string) *inode {
	n := d.root
	if name == "." {
		return n
	}
	for _, p := range strings.Split(name, "/") {
		if n == nil || !n.folder {
			return nil
		}
		n = n.names[p]
	}
	return n
}

// path is where a file is now, empty when it was removed. The lock is held.
func (d *disk) path(n *inode) string {
	var parts []string
	for ; n != d.root; n = n.parent {
		if n.parent == nil {
			return ""
		}
		parts = append(parts, n.name)
	}
	slices.Reverse(parts)
	return filepath.Join(append([]string{d.dir}, parts...)...)
}

// now is what a file has. The lock is held.
func (d *disk) now(n *inode) []byte {
	if p := d.path(n); p != "" {
		if b, err := os.ReadFile(p); err == nil {
			return b
		}
	}
	if n.synced {
		return n.content
	}
	return n.unlinked
}

// created notes that a name has come to be. The lock is held.
func (d *disk) created(name string, folder bool) error {
	if d.find(name) != nil {
		return nil
	}
	p := d.find(path.Dir(name))
	if p == nil {
		return fmt.Errorf("simulated disk: %s has no folder", name)
	}
	n := d.newInode(folder)
	n.parent, n.name = p, path.Base(name)
	p.names[n.name] = n
	d.ops = append(d.ops, operation{node: n, to: p, toName: n.name})
	return d.track(filepath.Join(d.dir, name), n)
}

// removed notes that a name is gone. The lock is held, and the file still there.
func (d *disk) removed(n *inode) {
	for _, name := range slices.Sorted(maps.Keys(n.names)) {
		d.removed(n.names[name])
	}
	if !n.folder && !n.synced {
		n.unlinked = d.now(n)
	}
	d.ops = append(d.ops, operation{node: n, from: n.parent, fromName: n.name})
	delete(n.parent.names, n.name)
	n.parent = nil
}

// renamed notes a rename. The lock is held.
func (d *disk) renamed(from, to string) {
	n, p := d.find(from), d.find(path.Dir(to))
	if n == nil || p == nil {
		return
	}
	if old := p.names[path.Base(to)]; old != nil && !old.folder && !old.synced {
		old.unlinked = d.now(old)
	}
	if old := p.names[path.Base(to)]; old != nil {
		old.parent = nil
	}
	d.ops = append(d.ops, operation{n, n.parent, p, n.name, path.Base(to)})
	delete(n.parent.names, n.name)
	n.parent, n.name = p, path.Base(to)
	p.names[n.name] = n
}

func (o operation) apply() {
	if o.from != nil && o.from.durable[o.fromName] == o.node {
		delete(o.from.durable, o.fromName)
	}
	if o.to != nil {
		o.to.durable[o.toName] = o.node
	}
}

// syncNames makes the operations on a folder durable, and those that they follow. The lock is held.
func (d *disk) syncNames(dir *inode) {
	need := map[*inode]bool{dir: true}
	keep := make([]bool, len(d.ops))
	for i := len(d.ops) - 1; i >= 0; i-- {
		o := d.ops[i]
		if need[o.from] || need[o.to] {
			keep[i] = true
			for _, f := range []*inode{o.from, o.to} {
				if f != nil {
					need[f] = true
				}
			}
		}
	}
	var left []operation
	for i, o := range d.ops {
		if keep[i] {
			o.apply()
		} else {
			left = append(left, o)
		}
	}
	d.ops = left
}

// survives reports whether a file is there after any loss of power, as it is now.
func (d *disk) survives(name string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.root
	for part := range strings.SplitSeq(path.Clean(name), "/") {
		if n = n.durable[part]; n == nil {
			return false
		}
	}
	return n.synced
}

// crash is the loss of power: what was not synced is as the seed says. The process must be dead.
func (d *disk) crash() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.boots++
	// How kind the crash is: from losing all that was not synced to losing nothing.
	kind := []float64{0, 0.5, 0.9, 1}[d.rnd.IntN(4)]
	lost := map[*inode]bool{} // folders that have lost an operation: later ones on them are lost as well
	for _, o := range d.ops {
		if d.rnd.Float64() >= kind || lost[o.from] || lost[o.to] {
			for _, f := range []*inode{o.from, o.to} {
				if f != nil {
					lost[f] = true
				}
			}
			continue
		}
		o.apply()
	}
	type file struct {
		name string
		b    []byte
	}
	var folders []string
	var files []file
	var walk func(n *inode, name string)
	walk = func(n *inode, name string) {
		folders = append(folders, name)
		for _, k := range slices.Sorted(maps.Keys(n.durable)) {
			c := n.durable[k]
			if c.folder {
				walk(c, path.Join(name, k))
			} else {
				files = append(files, file{path.Join(name, k), d.torn(c, kind)})
			}
		}
	}
	walk(d.root, ".")
	return d.renew(func(dir string) error {
		for _, f := range folders {
			if err := os.MkdirAll(filepath.Join(dir, f), 0o700); err != nil {
				return err
			}
		}
		for _, f := range files {
			if err := os.WriteFile(filepath.Join(dir, f.name), f.b, 0o600); err != nil {
				return err
			}
		}
		return nil
	})
}

const page = 4096

// torn is what a file has after a crash. The lock is held.
func (d *disk) torn(n *inode, kind float64) []byte {
	now := d.now(n)
	if n.synced && string(now) == string(n.content) || kind == 1 {
		return now
	}
	size := len(n.content)
	if d.rnd.Float64() < kind {
		size = len(now)
	} else if len(now) > size && d.rnd.IntN(2) == 0 {
		size = min(len(now), (size/page+1+d.rnd.IntN((len(now)-size)/page+1))*page)
	}
	out := make([]byte, size)
	for at := 0; at < size; at += page {
		end := min(at+page, size)
		from := n.content
		if d.rnd.Float64() < kind {
			from = now
		}
		if at < len(from) {
			copy(out[at:end], from[at:])
		}
	}
	return out
}

// renew moves to a new folder, which fill fills, and takes what is in it for durable. What dead processes still have
// open stays behind. The lock is held.
func (d *disk) renew(fill func(dir string) error) error {
	old := d.dir
	d.gen++
	d.dir = filepath.Join(d.base, fmt.Sprint(d.gen))
	if err := os.Mkdir(d.dir, 0o700); err != nil {
		return err
	}
	return errors.Join(fill(d.dir), os.RemoveAll(old), d.adopt())
}

// killed is the end of the process alone: the page cache keeps all that it wrote.
func (d *disk) killed() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	old := d.dir
	d.gen++
	d.dir = filepath.Join(d.base, fmt.Sprint(d.gen))
	if err := os.Remove(filepath.Join(old, "lock")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.Rename(old, d.dir)
}

// called is how many calls there were so far.
func (d *disk) called() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.calls
}

// crashFrom makes everything fail from a call on.
func (d *disk) crashFrom(call int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.crashAt = call
}

// slower adds to the time of each sync.
func (d *disk) slower(by time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.slow = by
}

// hasCrashed reports whether everything fails.
func (d *disk) hasCrashed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.crashAt > 0 && d.calls >= d.crashAt
}

// slowerAll adds to the time of each sync of all.
func (d *disk) slowerAll(by time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.all = by
}

// wipe puts an empty disk in the place of this one.
func (d *disk) wipe() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.rotten = map[string]bool{}
	return d.renew(func(string) error { return nil })
}

// snapshot copies what is there.
func (d *disk) snapshot(to string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return os.CopyFS(to, os.DirFS(d.dir))
}

// restore puts a copy that snapshot made in the place of what is there.
func (d *disk) restore(from string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.renew(func(dir string) error {
		if err := os.CopyFS(dir, os.DirFS(from)); err != nil {
			return err
		}
		return errors.Join(ignoreMissing(os.Remove(filepath.Join(dir, "lock"))))
	})
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// flip changes a bit in the file of a blob, on the disk and in the page cache. It returns false when the blob is not
// there.
func (d *disk) flip(hex string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	name := path.Join("blobs/sha256", hex[:2], hex, "data")
	n := d.find(name)
	if n == nil {
		return false
	}
	b := d.now(n)
	if len(b) == 0 {
		return false
	}
	at := d.rnd.IntN(len(b))
	f, err := os.OpenFile(filepath.Join(d.dir, name), os.O_WRONLY, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{b[at] ^ 1}, int64(at)); err != nil {
		return false
	}
	if at < len(n.content) {
		n.content[at] ^= 1
	}
	d.rotten[hex] = true
	return true
}
