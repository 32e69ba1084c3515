package sim

import (
	"bytes"
	"context"
	"crypto/sha1"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/origin/store"
	"kraken/proto/blob"
)

// kept is what a store has said that it keeps. What a call that was cut may have done is in maybe.
type kept struct {
	bytes  map[digest.Digest][]byte // all that was ever written
	whole  map[digest.Digest]bool
	owed   map[digest.Digest]bool
	pins   map[digest.Digest]bool
	names  map[string]string
	maybe  func(*kept) // the change under way, nil for none
	pieces map[digest.Digest]*blob.Metainfo

	generation int64 // of names
}

func newKept() *kept {
	return &kept{bytes: map[digest.Digest][]byte{}, whole: map[digest.Digest]bool{}, owed: map[digest.Digest]bool{}, pins: map[digest.Digest]bool{},
		names: map[string]string{}, pieces: map[digest.Digest]*blob.Metainfo{}}
}

func (k *kept) clone() *kept {
	return &kept{bytes: k.bytes, whole: maps.Clone(k.whole), owed: maps.Clone(k.owed), pins: maps.Clone(k.pins), names: maps.Clone(k.names), pieces: k.pieces, generation: k.generation}
}

// script is what is done to a store until its disk crashes.
type script struct {
	s   *store.Store
	k   *kept
	ctx context.Context
	err error
	// failed says that the disk has failed a call. The script ends, by end, with the next one that says what is kept:
	// it may be the same once more.
	failed bool
	end    func() error
}

// do makes one call, whose change counts once it has returned; nil is that of one that says nothing. One that the disk
// has failed is made once more.
func (x *script) do(call func() error, change func(*kept)) {
	if x.err != nil {
		return
	}
	x.k.maybe = change
	x.err = call()
	if errors.Is(x.err, errIO) {
		x.failed = true
		if x.err = call(); x.err != nil { // who made it is told so
			x.err = errCrashed
		}
	}
	if x.err != nil {
		return
	}
	x.k.maybe = nil
	if change == nil {
		return
	}
	change(x.k)
	if x.failed {
		x.err = x.end()
	}
}

func (x *script) blob(n, size int) ([]byte, digest.Digest) {
	b := content(n, size)
	d := digest.FromBytes(b)
	x.k.bytes[d] = b
	return b, d
}

func owedTo(repos ...string) *store.Marker {
	return &store.Marker{Targets: []string{"b"}, Repositories: repos, Created: time.Unix(1, 0).UTC()}
}

// ingest takes a blob in, owed or not.
func (x *script) ingest(n, size int, m *store.Marker) digest.Digest {
	b, d := x.blob(n, size)
	x.do(func() error {
		_, err := x.s.Ingest(x.ctx, d, int64(size), bytes.NewReader(b), m)
		return err
	}, func(k *kept) { k.whole[d], k.owed[d] = true, k.owed[d] || m != nil })
	return d
}

// upload pushes a blob in chunks.
func (x *script) upload(n, size int, again bool) digest.Digest {
	b, d := x.blob(n, size)
	var u *store.Upload
	x.do(func() (err error) {
		u, err = x.s.NewUpload(store.UploadOptions{Size: int64(size), Note: "team/a"})
		return err
	}, nil)
	for at := 0; at < size; at += 3000 {
		part := b[at:min(at+3000, size)]
		x.do(func() error {
			_, err := u.Write(x.ctx, int64(at), bytes.NewReader(part))
			return err
		}, nil)
	}
	x.do(func() error {
		_, err := u.Commit(x.ctx, d, owedTo("team/a"))
		return err
	}, func(k *kept) { k.whole[d], k.owed[d] = true, true })
	return d
}

// put stores a name record, as origins do: one that is held already stays.
func (x *script) put(key, value string) {
	x.do(func() error {
		return x.s.ChangeName(key, func(held []byte, err error) (store.NameChange, []byte) {
			if err == nil && string(held) == value {
				return store.LeaveName, nil
			}
			return store.ReplaceName, []byte(value)
		})
	}, func(k *kept) { k.names[key] = value })
}

// raise makes the generation of names at least n.
func (x *script) raise(n int64) {
	x.do(func() error {
		_, err := x.s.RaiseGeneration(n)
		return err
	}, func(k *kept) { k.generation = n })
}

// partial fetches a blob piece by piece, and commits it unless it is to stay one.
func (x *script) partial(n, size int, commit bool) {
	b, d := x.blob(n, size)
	h := blob.NewPieceHasher(int64(size))
	_, _ = h.Write(b)
	m, err := h.Sum(d)
	if err != nil {
		x.err = err
		return
	}
	x.k.pieces[d] = m
	var p *store.Partial
	x.do(func() (err error) {
		p, err = x.s.Partial(m)
		return err
	}, nil)
	if p == nil {
		return
	}
	for i := range m.NumPieces() {
		off := int64(i) * m.PieceLength()
		x.do(func() error {
			_, err := p.WriteAt(b[off:off+m.PieceSize(i)], off)
			return errors.Join(err, p.MarkVerified(i))
		}, nil)
		if i%2 == 1 {
			x.do(p.Flush, nil)
		}
	}
	if commit {
		x.do(func() error {
			_, err := p.Commit(x.ctx)
			return err
		}, nil)
		x.do(func() error { return x.s.Mark(d, *owedTo("team/a")) }, func(k *kept) { k.whole[d], k.owed[d] = true, true })
	}
	_ = p.Close() // after a crash it fails
}

func (x *script) run() {
	a := x.ingest(1, 5000, owedTo("team/a"))
	b := x.ingest(2, 9000, nil)
	c := x.upload(3, 10_000, false)
	x.do(func() error { return x.s.Mark(b, *owedTo("team/b")) }, func(k *kept) { k.owed[b] = true })
	x.ingest(1, 5000, owedTo("team/c")) // known already: it owes to a further repository
	x.do(func() error {
		_, err := x.s.ComputeMetainfo(x.ctx, a)
		return err
	}, nil)
	x.put("k1", "one")
	x.put("k2", "two")
	x.put("k1", "three")
	x.do(func() error { return x.s.DeleteName("k2") }, func(k *kept) { delete(k.names, "k2") })
	x.raise(7)
	x.raise(9)
	x.do(func() error { return x.s.Pin(b) }, func(k *kept) { k.pins[b] = true })
	x.do(func() error { return x.s.Pin(a) }, func(k *kept) { k.pins[a] = true })
	x.do(func() error { return x.s.Unpin(a) }, func(k *kept) { delete(k.pins, a) })
	x.partial(4, 300_000, true)
	x.partial(5, 400_000, false)
	m, err := x.s.Marker(c)
	if x.err == nil && err != nil {
		x.err = err
	}
	x.do(func() error { return x.s.Unmark(c, m, "b") }, func(k *kept) { delete(k.owed, c) })
	x.do(func() error { return x.s.Delete(c) }, func(k *kept) { delete(k.whole, c) })
	x.upload(3, 10_000, true) // again after it was deleted
	for n := range 12 {       // beyond the capacity: what is not owed makes room
		x.evicting(20+n, 100_000)
	}
}

// evicting takes in a blob that is not owed, for which others may go.
func (x *script) evicting(n, size int) {
	b, d := x.blob(n, size)
	x.do(func() error {
		_, err := x.s.Ingest(x.ctx, d, int64(size), bytes.NewReader(b), nil)
		return err
	}, func(k *kept) {
		for w := range k.whole {
			if !k.owed[w] && !k.pins[w] {
				delete(k.whole, w)
			}
		}
	})
}

func openStore(d *disk, p *process) (*store.Store, error) {
	return store.Open(store.Config{Dir: d.dir, OpenFS: d.open(p), Capacity: 1 << 20, Keep: store.Keep{Scrub: store.ScrubConfig{Off: true}}})
}

// ending is how a store ends in the middle of a call.
type ending int

const (
	killed          ending = iota // the process alone
	powerLoss                     // what was not synced is as a seed decides
	killedThenPower               // the next process has looked at the disk before the power goes
	failedThenPower               // the call fails and no other; what was cut by that is done again, and then the power goes
)

// crashRun runs the script until call k of the file system, ends it as how says, and returns what is wrong after it,
// and how many calls there were.
func crashRun(dir string, k int, seed uint64, how ending) (wrong []string, calls int) {
	d, err := newDisk(dir, seed)
	if err != nil {
		return []string{err.Error()}, 0
	}
	h := newNetwork(seed).addHost("origin")
	p := h.start()
	state := newKept()
	x := &script{k: state, ctx: context.Background()}
	if how == failedThenPower {
		d.failAt = k
	} else {
		d.crashAt = k
	}
	x.end = func() error {
		wrong = append(wrong, listed(x.s, state)...)
		d.crashFrom(1)
		return errCrashed
	}
	if x.s, x.err = openStore(d, p); x.err == nil {
		if x.err = awaitScan(x.s, d); x.err == nil {
			x.run()
		}
	} else if errors.Is(x.err, errIO) {
		x.err = nil
	}
	if x.err != nil && !errors.Is(x.err, errCrashed) {
		wrong = append(wrong, fmt.Sprintf("the script failed: %v", x.err))
	}
	calls = d.called() // its scan may go on yet
	p.kill(false)
	if x.s != nil {
		_ = x.s.Close() // of a dead process
	}
	d.crashAt, d.failAt = 0, 0
	states := []*kept{state}
	if state.maybe != nil {
		after := state.clone()
		state.maybe(after)
		states = append(states, after)
	}
	look := func(power bool) *kept { // by a new process
		if err := errors.Join(d.killed(), crashIf(d, power)); err != nil {
			wrong = append(wrong, err.Error())
			return nil
		}
		p := h.start()
		defer p.kill(false)
		d.slowerAll(time.Second)
		s, err := openStore(d, p)
		if err != nil {
			wrong = append(wrong, fmt.Sprintf("the store does not open: %v", err))
			return nil
		}
		if power || (uint64(k)+seed)%2 == 0 {
			<-s.Scanned()
		} // else each is looked up before the scan has found it
		wrong = append(wrong, compare(s, states, power)...)
		said := observe(s, state)
		if how == killedThenPower && !power {
			p.kill(false) // it is not closed, either
		}
		if err := s.Close(); err != nil && p.alive() {
			wrong = append(wrong, err.Error())
		}
		return said
	}
	if how == killedThenPower {
		if said := look(false); said != nil { // others go by what it says
			states = []*kept{said}
		}
	}
	look(how != killed)
	return wrong, calls
}

// awaitScan waits until a store has found all that is there, or the disk has crashed before: then it never does.
func awaitScan(s *store.Store, d *disk) error {
	for {
		select {
		case <-s.Scanned():
			return nil
		case <-time.After(time.Minute):
			if d.hasCrashed() {
				return errCrashed
			}
		}
	}
}

// listed says what a store keeps and does not tell of when it is asked for all.
func listed(s *store.Store, k *kept) (wrong []string) {
	names, marked := s.Names(), s.Marked()
	for key := range k.names {
		if !slices.Contains(names, key) {
			wrong = append(wrong, fmt.Sprintf("name %s is kept and not listed", key))
		}
	}
	for d := range k.owed {
		if k.owed[d] && !slices.Contains(marked, d) {
			wrong = append(wrong, fmt.Sprintf("blob %s is owed and not listed", short(d.String())))
		}
	}
	return wrong
}

// observe returns what a store says that it keeps, of what a script has written.
func observe(s *store.Store, of *kept) *kept {
	k := newKept()
	k.bytes, k.pieces = of.bytes, of.pieces
	for d := range of.bytes {
		_, k.whole[d] = readStored(s, d)
		_, err := s.Marker(d)
		k.owed[d] = err == nil
	}
	for _, d := range s.Pins() {
		k.pins[d] = true
	}
	for _, key := range []string{"k1", "k2"} {
		if b, err := s.Name(key); err == nil {
			k.names[key] = string(b)
		}
	}
	k.generation, _ = s.RaiseGeneration(0)
	return k
}

func crashIf(d *disk, power bool) error {
	if power {
		return d.crash()
	}
	return nil
}

// compare says where a store is not as it may be. Each fact may be that of any of the states. After a loss of power
// what was removed may be back.
func compare(s *store.Store, states []*kept, power bool) (wrong []string) {
	bad := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	all := func(f func(*kept) bool) bool {
		return !slices.ContainsFunc(states, func(k *kept) bool { return !f(k) })
	}
	for d, want := range states[0].bytes {
		got, there := readStored(s, d)
		if there && !bytes.Equal(got, want) {
			bad("blob %s has %d wrong bytes", short(d.String()), len(got))
		}
		must := all(func(k *kept) bool { return k.whole[d] })
		if must && !there && all(func(k *kept) bool { return k.owed[d] || k.pins[d] }) {
			bad("blob %s is lost", short(d.String()))
		}
		_, err := s.Marker(d)
		if all(func(k *kept) bool { return k.owed[d] }) && err != nil {
			bad("blob %s is owed no more: %v", short(d.String()), err)
		}
		if m := states[0].pieces[d]; m != nil && !there {
			wrong = append(wrong, comparePieces(s, m)...)
		}
	}
	pins := s.Pins()
	for d := range states[0].bytes {
		if all(func(k *kept) bool { return k.pins[d] }) && !slices.Contains(pins, d) {
			bad("blob %s is pinned no more", short(d.String()))
		}
		if all(func(k *kept) bool { return !k.pins[d] }) && slices.Contains(pins, d) && !power {
			bad("blob %s is pinned", short(d.String()))
		}
	}
	if n, err := s.RaiseGeneration(0); err != nil || all(func(k *kept) bool { return n < k.generation }) {
		bad("the generation is %d, %v", n, err)
	}
	for _, key := range []string{"k1", "k2"} {
		b, err := s.Name(key)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			bad("name %s: %v", key, err)
		}
		if !slices.ContainsFunc(states, func(k *kept) bool {
			v, there := k.names[key]
			return v == string(b) && there == (err == nil)
		}) && !(power && key == "k2") { // a removal is not synced: build-index takes the record back once more
			bad("name %s is %q, %v", key, b, err)
		}
	}
	return wrong
}

func readStored(s *store.Store, d digest.Digest) ([]byte, bool) {
	r, err := s.Open(d)
	if err != nil {
		return nil, false
	}
	defer r.Close()
	b, err := io.ReadAll(r.File())
	return b, err == nil
}

// comparePieces looks at the pieces that a partial blob says it has.
func comparePieces(s *store.Store, m *blob.Metainfo) (wrong []string) {
	p, err := s.Partial(m)
	if err != nil {
		return []string{fmt.Sprintf("partial %s: %v", short(m.Digest.String()), err)}
	}
	defer p.Close()
	for i := range m.NumPieces() {
		if !p.Has(i) {
			continue
		}
		b := make([]byte, m.PieceSize(i))
		if _, err := p.ReadAt(b, int64(i)*m.PieceLength()); err != nil || sha1.Sum(b) != m.PieceHash(i) {
			wrong = append(wrong, fmt.Sprintf("piece %d of %s is not what it was: %v", i, short(m.Digest.String()), err))
		}
	}
	return wrong
}

// TestStoreCrashes ends a store at every call of its file system that changes something, with and without the loss of
// what was not synced, or has that call fail alone.
func TestStoreCrashes(t *testing.T) {
	base := memoryDir(t)
	runs := 0
	one := func(k int, seed uint64, how ending) (wrong []string, calls int) {
		runs++
		var w watch
		defer w.begin(t.Name())()
		synctest.Test(t, func(*testing.T) {
			defer w.tick(time.Now())()
			wrong, calls = crashRun(fmt.Sprintf("%s/%d", base, runs), k, seed, how)
		})
		for _, x := range wrong {
			t.Errorf("crash at call %d, seed %d, ending %d: %s", k, seed, how, x)
		}
		return wrong, calls
	}
	_, calls := one(0, 1, killed)
	if calls < 100 {
		t.Fatalf("the script makes %d calls only", calls)
	}
	seeds := uint64(*crashSeedsFlag)
	for k := 1; k <= calls && !t.Failed(); k++ {
		if k%3 == 0 || seeds > 1 {
			one(k, 1, killed)
		}
		for seed := range seeds {
			one(k, seed+1, powerLoss)
			one(k, seed+1, killedThenPower)
			one(k, seed+1, failedThenPower)
		}
	}
	t.Logf("%d runs, %d calls", runs, calls)
}
