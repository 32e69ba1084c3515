package sim

import (
	"fmt"
	"log/slog"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
)

// Result is what a run found.
type Result struct {
	Plan       Plan
	Violations []Violation
	History    string
	Virtual    time.Duration
}

// Run executes a plan. It is called in a bubble of testing/synctest, whose clock it sets to now first: files have real
// times.
func Run(p Plan, dir string, level slog.Level, now time.Time) Result {
	time.Sleep(time.Until(now))
	s, err := New(Options{Seed: p.Seed, Origins: p.Origins, Twin: p.Twin, Dir: dir, Log: level})
	if err != nil {
		return Result{Plan: p, Violations: []Violation{{Kind: "sim", Text: err.Error()}}}
	}
	s.Up()
	for i, e := range p.Epochs {
		s.history.note("epoch %d", i+1)
		s.play(e)
		s.Settle()
		s.CheckAll(fmt.Sprintf("after epoch %d", i+1))
	}
	s.Restore()
	s.CheckAll("after the restore")
	s.Close()
	return Result{Plan: p, Violations: s.history.violations(), History: s.history.String(), Virtual: time.Since(s.history.began)}
}

// play executes the steps of an epoch. It returns when the last one was begun.
func (s *Sim) play(e Epoch) {
	began := time.Now()
	for _, step := range e {
		time.Sleep(step.At - time.Since(began))
		synctest.Wait()
		s.supervise()
		s.step(step)
		synctest.Wait()
		s.checkDebts()
	}
}

func (s *Sim) step(x Step) {
	all := s.nodes()
	n := all[x.Node%len(all)]
	repo, tag := fmt.Sprintf("team/%c", 'a'+x.Repo), fmt.Sprintf("v%d", x.Tag)
	switch x.Do {
	case DoPush, DoRace, DoPull, DoMount, DoDeleteTag, DoDeleteImage, DoDeleteBlob:
		s.ops.Go(func() { s.operate(x, repo, tag) })
		return
	case Flip:
		s.Flip(x.Node, s.blob(x.Blob))
		return
	case Switch:
		s.history.note("%s to %s for %s", x.Do, n.name, []string{"proxy-01", "proxy-02", "both proxies"}[x.Proxy])
	case Late, Twice:
		s.history.note("%s %.2f", x.Do, x.Share)
	case BucketSlow:
		s.history.note("%s %s %.2f", x.Do, x.Latency, x.Share)
	case BucketDown, BucketHung, BucketUp:
		s.history.note("%s", x.Do)
	case Part, Join:
		s.history.note("%s %s and %s", x.Do, n.name, all[x.Other%len(all)].name)
	default:
		s.history.note("%s %s", x.Do, n.name)
	}
	s.disturb(x, n, all[x.Other%len(all)])
}

// disturb does what is no client's doing.
func (s *Sim) disturb(x Step, n, other *node) {
	s.net.mu.Lock()
	switch x.Do {
	case Late:
		s.net.late = x.Share
	case Twice:
		s.net.twice = x.Share
	}
	s.net.mu.Unlock()
	switch x.Do {
	case Kill:
		n.kill(false)
	case Vanish:
		n.kill(true)
		n.crash()
	case PowerLoss:
		n.kill(false)
		n.crash()
	case Start:
		n.start()
	case Stop:
		n.stop()
	case Switch:
		s.lead(n, x.Proxy)
	case Copy:
		n.copyOf(other, x.Share > 0)
	case Freeze, Thaw:
		if n.p.Load() != nil {
			s.net.freeze(n.h, x.Do == Freeze)
		}
	case Part, Join:
		s.net.part(n.h, other.h, x.Do == Part)
	case Reset, Finish:
		s.net.cut(n.h, 2, x.Do == Finish)
	case BucketDown:
		s.bucket.set(bucketDown)
	case BucketHung:
		s.bucket.set(bucketHung)
	case BucketUp:
		s.bucket.set(bucketUp)
	case BucketSlow:
		s.bucket.slow(max(x.Latency, 2*time.Millisecond), x.Share)
	case DiskSlow:
		if n.disk != nil {
			n.disk.slower(x.Latency)
		}
	case Snapshot:
		n.snapshot()
	case Wipe:
		s.loses(n, "", func() {
			n.kill(false)
			n.wipe()
		})
	case Revert:
		if n.old != "" {
			s.loses(n, "", func() {
				n.kill(false)
				if err := n.revert(); err != nil {
					s.history.violate("sim", "revert: %v", err)
				}
			})
		}
	}
}

// crash makes the disk of a machine that is down forget what was not synced. What build-index has committed is synced.
func (n *node) crash() {
	if n.disk == nil {
		return
	}
	if err := n.disk.crash(); err != nil {
		n.s.history.violate("sim", "crash %s: %v", n.name, err)
	}
}

// Flip changes a bit of an origin's copy of a blob.
func (s *Sim) Flip(origin int, b []byte) {
	n := s.origins[origin%len(s.origins)]
	d := digest.FromBytes(b)
	s.loses(n, d, func() {
		if n.disk.flip(d.Encoded()) {
			s.history.note("a bit flips in %s at %s", short(d.String()), n.name)
		}
	})
}

var sizes = []int{40, 700, 5_000, 9_000, 33_000, 70_000, 100, 12_345, 150_000}

// blob is one of the blobs that plans speak of.
func (s *Sim) blob(k int) []byte { return content(int(s.Seed%251)<<8|k, sizes[k%len(sizes)]) }

// image is one of the images that plans speak of: they share blobs.
func (s *Sim) image(k int) *Image {
	return NewImage(fmt.Sprintf("image-%d", k), s.blob(k%blobs), s.blob((k+3)%blobs), s.blob((2*k+5)%blobs))
}

// operate does what a client does, alone in its repository.
func (s *Sim) operate(x Step, repo, tag string) {
	if x.Do == DoPull {
		s.pull(x.Proxy, repo, tag)
		return
	}
	defer s.lock(repo)()
	i := s.image(x.Image)
	var err error
	switch x.Do {
	case DoPush:
		err = s.PushImage(x.Proxy, repo, tag, i, x.Push)
	case DoRace:
		done := make(chan error)
		go func() { done <- s.PushImage(1-x.Proxy, repo, tag, s.image(x.Image+1), x.Push) }()
		err = s.PushImage(x.Proxy, repo, tag, i, x.Push)
		<-done
	case DoMount:
		err = s.Mount(x.Proxy, repo, fmt.Sprintf("team/%c", 'a'+x.Other), s.blob(x.Blob), x.Push)
	case DoDeleteTag:
		err = s.DeleteTag(x.Proxy, repo, tag, x.Push)
	case DoDeleteImage:
		err = s.DeleteImage(x.Proxy, repo, i, x.Push)
	case DoDeleteBlob:
		err = s.DeleteBlob(x.Proxy, repo, s.blob(x.Blob), x.Push)
	}
	_ = err // it is in the history, and the model knows it
}

// pull reads a tag, its manifest and its blobs.
func (s *Sim) pull(proxy int, repo, tag string) {
	s.mu.Lock()
	names := s.model.sorted()
	s.mu.Unlock()
	for _, n := range names {
		if n.repo == repo && (n.kind != "tag" || n.what == tag) {
			if err := s.Read(proxy, n, 2); err != nil {
				s.history.note("  read %s: %s", n, brief(err))
			}
		}
	}
}
