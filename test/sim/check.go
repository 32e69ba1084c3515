package sim

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/layout"
)

// acknowledge notes that a client was told that a blob is stored. s.mu is held.
func (s *Sim) acknowledge(d digest.Digest, repo string, began time.Time) {
	a := s.model.blobs[d]
	if a == nil {
		a = &acknowledged{at: time.Now(), repo: repo}
		s.model.blobs[d] = a
	}
	if s.inBucket(d) {
		a.safe = true
		return
	}
	copies, want := 0, min(s.Replicas, len(s.origins))
	for _, n := range s.origins {
		if n.owes(d) && n.keeps(d) { // one whose commit is under way has promised nothing
			copies++
		}
		if n.lostAt.After(began) || n.rottenAt[d].After(began) { // a copy of it may have counted
			want--
		}
	}
	if copies < want {
		s.history.violate("short", "blob %s was acknowledged with %d copies that owe it, in the place of %d, and the bucket lacks it", short(d.String()), copies, want)
	}
	a.need = max(a.need, min(copies, s.Replicas))
}

// inBucket says that the bucket has the right bytes.
func (s *Sim) inBucket(d digest.Digest) bool {
	b, ok := s.bucket.get(layout.BlobKey(d))
	return ok && digest.FromBytes(b) == d
}

// owners are the origins whose disks have the blob whole, and say that it is owed to the bucket.
func (s *Sim) owners(d digest.Digest) (out []*node) {
	for _, n := range s.origins {
		if n.owes(d) {
			out = append(out, n)
		}
	}
	return out
}

// owes looks at the disk, whether the origin runs or not.
func (n *node) owes(d digest.Digest) bool {
	h := d.Encoded()
	n.disk.mu.Lock() // the folder is another one after a kill
	defer n.disk.mu.Unlock()
	dir := filepath.Join(n.disk.dir, "blobs/sha256", h[:2], h)
	b, err := os.ReadFile(filepath.Join(dir, "data"))
	if err != nil || digest.FromBytes(b) != d {
		return false
	}
	if _, err := os.Stat(filepath.Join(dir, "pieces")); err == nil {
		return false
	}
	return n.debtIn(dir, h)
}

// hasDebt looks on the disk whether the origin owes a blob, whatever its copy is.
func (n *node) hasDebt(d digest.Digest) bool {
	h := d.Encoded()
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	return n.debtIn(filepath.Join(n.disk.dir, "blobs/sha256", h[:2], h), h)
}

// debtIn reads the debt of the blob h whose folder is dir. The disk's lock is held.
func (n *node) debtIn(dir, h string) bool {
	for _, f := range []string{filepath.Join(dir, "writeback"), filepath.Join(n.disk.dir, "debts", "sha256-"+h)} {
		raw, err := os.ReadFile(f)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		var m struct {
			Targets []string `json:"targets"`
		}
		if err == nil && json.Unmarshal(raw, &m) == nil && len(m.Targets) > 0 {
			return true
		}
	}
	return false
}

// keeps reports whether the copy of a blob that an origin owes would survive a loss of power.
func (n *node) keeps(d digest.Digest) bool {
	h := d.Encoded()
	dir := path.Join("blobs/sha256", h[:2], h)
	return n.disk.survives(path.Join(dir, "data")) && (n.disk.survives(path.Join(dir, "writeback")) || n.disk.survives(path.Join("debts", "sha256-"+h)))
}

// checkDebts is the rule of debts: what is acknowledged is in the bucket, or owed by as many origins as were promised,
// less those whose disks were lost since.
func (s *Sim) checkDebts() {
	if s.Unchecked {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.sortedBlobs() {
		a := s.model.blobs[d]
		if a.safe || a.need == 0 {
			continue
		}
		if s.inBucket(d) {
			a.safe = true
			continue
		}
		n := len(s.owners(d))
		if n < a.need && n+s.rottenMeanwhile(d) >= a.need {
			a.need = n
		}
		if n < a.need {
			s.history.violate("debt", "blob %s is not in the bucket, and %d origins owe it and have it, in the place of %d", short(d.String()), n, a.need)
			a.need = n
		}
	}
	for _, k := range s.bucket.wrong() {
		s.history.violate("wrong", "the bucket has other bytes under %s", k)
	}
}

// rottenMeanwhile is how many origins owe a blob whose copy has rotted a moment ago: one that has hashed a copy, to
// take a debt over, may lose it before it has noted the debt.
func (s *Sim) rottenMeanwhile(d digest.Digest) (count int) {
	for _, n := range s.origins {
		if time.Since(n.rottenAt[d]) < 5*time.Second && n.hasDebt(d) {
			count++
		}
	}
	return count
}

func (s *Sim) sortedBlobs() (out []digest.Digest) {
	for d := range s.model.blobs {
		out = append(out, d)
	}
	slices.Sort(out)
	return out
}

// loses notes that a disk is lost, or its copy of one blob, and loses it: nobody is told that a blob is stored between
// the two, since copies that are about to go would count for it.
func (s *Sim) loses(n *node, only digest.Digest, lose func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer lose()
	n.lost = true
	if only == "" {
		n.lostAt = time.Now()
	} else {
		n.rottenAt[only] = time.Now()
	}
	if n.disk == nil {
		return
	}
	for d, a := range s.model.blobs {
		if a.need > 0 && !a.safe && (only == "" || only == d) && n.owes(d) {
			a.need--
		}
	}
}

// mayBeLost says that all copies of a blob were on disks that were lost before the bucket had it. s.mu is held.
func (s *Sim) mayBeLost(d string) bool {
	a := s.model.blobs[digest.Digest(d)]
	return a != nil && !a.safe && a.need == 0 && !s.inBucket(digest.Digest(d))
}

// allKept says that no blob was lost with its disks: what refers to such a one can't be published.
func (s *Sim) allKept() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for d := range s.model.blobs {
		if s.mayBeLost(d.String()) {
			return false
		}
	}
	return true
}

// isRotten says that a bit of a copy was flipped.
func (s *Sim) isRotten(d string) bool {
	dd := digest.Digest(d)
	if _, err := hex.DecodeString(dd.Encoded()); err != nil {
		return false
	}
	for _, n := range s.origins {
		n.disk.mu.Lock()
		rotten := n.disk.rotten[dd.Encoded()]
		n.disk.mu.Unlock()
		if rotten {
			return true
		}
	}
	return false
}

// Settle heals everything and waits until nothing is owed any more. What does not get there is a violation.
func (s *Sim) Settle() {
	s.history.note("heal everything")
	s.heal()
	s.ops.Wait()
	if err := await(15*time.Minute, s.owing); err != nil && s.allKept() {
		s.history.violate("stuck", "a quarter of an hour after all was healed: %v", err)
	}
	s.standBy()
	time.Sleep(2 * time.Minute)
	s.checkDebts()
	for _, n := range s.nodes() {
		n.lost = false
	}
}

// CheckAll reads every name by every proxy and compares; after it each has one value. when says in the history what
// went before.
func (s *Sim) CheckAll(when string) {
	s.history.note("check all %s", when)
	s.mu.Lock()
	names := s.model.sorted()
	s.mu.Unlock()
	for _, n := range names {
		s.checkName(n)
	}
}

// checkName reads one name by both proxies.
func (s *Sim) checkName(n name) {
	const patience = 40
	var seen []string
	for i, c := range s.clients {
		var v string
		var b []byte
		err := errNoAnswer
		for try := 0; err != nil && try < patience; try++ {
			if try > 0 {
				time.Sleep(time.Second)
			}
			if v, b, err = s.read(c, n, defaultTimeout); err != nil {
				continue
			}
			s.mu.Lock()
			r := s.model.beginRead(n)
			r.end()
			s.mu.Unlock()
			err = s.judge(n, v, b, r, c)
			if errors.Is(err, errWrongAnswer) {
				break
			}
		}
		if err != nil && !errors.Is(err, errWrongAnswer) {
			s.history.violate("stuck", "%s can't be read though all is well: %v", n, err)
			return
		}
		seen = append(seen, v)
		if i > 0 && v != seen[0] {
			s.history.violate("stale", "%s is %s at one proxy and %s at another", n, short(seen[0]), short(v))
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.model.settle(n, seen[0])
	if n.kind == "layer" && s.mayBeLost(n.what) { // it may be pushed again, to another repository
		s.model.of(n).may[there] = true
	}
}

// Restore loses everything but the bucket, and waits until names are back.
func (s *Sim) Restore() {
	s.history.note("everything but the bucket is lost")
	s.mu.Lock()
	s.model.unpublished(func(d digest.Digest) bool { return s.mayBeLost(d.String()) })
	s.mu.Unlock()
	for _, n := range s.nodes() {
		if n.disk != nil || n.database != "" {
			n.kill(false)
			n.wipe()
		}
	}
	s.heal()
	if err := await(10*time.Minute, s.owing); err != nil {
		s.history.violate("stuck", "ten minutes after the restore began: %v", err)
	}
}

// wipe puts an empty disk into a machine that is down.
func (n *node) wipe() {
	if n.disk != nil {
		if err := n.disk.wipe(); err != nil {
			n.s.history.violate("sim", "wipe %s: %v", n.name, err)
		}
		return
	}
	n.database = n.s.folder(n.name)
}

// snapshot keeps a copy of a disk as it is now.
func (n *node) snapshot() {
	to := n.s.folder(n.name + "-old")
	var err error
	if n.disk != nil {
		err = n.disk.snapshot(to)
	} else {
		err = copyDatabase(n.database, to)
	}
	if err != nil {
		n.s.history.violate("sim", "copy the disk of %s: %v", n.name, err)
		return
	}
	n.old = to
}

// revert brings the copy back, on a machine that is down.
func (n *node) revert() error {
	if n.old == "" {
		return fmt.Errorf("%s has no older state", n.name)
	}
	if n.disk != nil {
		return n.disk.restore(n.old)
	}
	return n.copyDatabase(n.old)
}
