package buildindex

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"kraken/proto/cluster"
	"kraken/proto/role"
)

// short has the records of changes that fewer origins keep than there are replicas, because the others were away. They
// are brought to further ones when these are back: a build-index that has lost its database takes what all origins but
// replicas - 1 have for all that there is. It is safe for concurrent use.
type short struct {
	mu      sync.Mutex
	records map[string]shortRecord // by cluster.NameKey
	bytes   int
}

type shortRecord struct {
	cluster.NameRecord
	raw []byte // the manifest's, for origins that know whole records only
}

func (s shortRecord) size() int { return len(s.Bytes) + len(s.raw) + 512 }

const (
	// maxShort bounds the bytes that are kept for origins that are away; what is beyond waits for the bucket alone.
	maxShort = 64 << 20
	// topUpEvery is how often it is tried to bring records to further origins, and how long a try may take.
	topUpEvery = 500 * time.Millisecond
)

// add keeps a record in the place of an earlier one of the same name. It reports whether there is room for it.
func (s *short) add(r shortRecord) (room bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := cluster.NameKey(r.NameRecord)
	if !s.drop(k, r.Generation) {
		return true
	}
	if s.bytes+r.size() > maxShort {
		return false
	}
	if s.records == nil {
		s.records = map[string]shortRecord{}
	}
	s.records[k] = r
	s.bytes += r.size()
	return true
}

// addShort takes up queued changes of a process before this one that fewer origins keep than there are replicas, as
// many as there is room for. kept is what all origins keep.
func (x *Index) addShort(ctx context.Context, kept []recordID) error {
	copies := map[recordID]int{}
	for _, id := range kept {
		copies[id]++
	}
	for id, n := range copies {
		if n >= x.copies() {
			continue
		}
		rows, err := x.db.Queued(ctx, id.generation)
		if err != nil {
			return err
		}
		for _, row := range rows {
			if row.Err != nil || row.Record.Version == unrecorded || cluster.NameKey(row.Record) != id.key {
				continue
			}
			r, raw, err := x.recordOfQueued(ctx, row.Record)
			if ignoreMissing(err) != nil {
				return err
			}
			if err == nil && !x.short.add(shortRecord{x.signer.Sign(r), raw}) {
				return nil
			}
		}
	}
	return nil
}

// remove forgets a record, and earlier ones of the same name: there are enough of them, or they are not wanted any
// more.
func (s *short) remove(r cluster.NameRecord) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop(cluster.NameKey(r), r.Generation)
}

// drop takes out what is kept under k, up to a generation, and reports whether nothing is left. The lock is held.
func (s *short) drop(k string, generation int64) bool {
	old, ok := s.records[k]
	if ok && old.Generation > generation {
		return false
	}
	if ok {
		delete(s.records, k)
		s.bytes -= old.size()
	}
	return true
}

func (s *short) all() []shortRecord {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.records))
}

// has reports whether this very record is kept.
func (s *short) has(r shortRecord) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.records[cluster.NameKey(r.NameRecord)].Generation == r.Generation
}

// topUp brings records that too few origins keep to further ones, again and again.
func (x *Index) topUp(ctx context.Context) error {
	for role.Pause(ctx, topUpEvery) {
		if x.begunTenure() {
			x.topUpOnce(ctx)
		}
	}
	return nil
}

// keepEverywhere writes a record to all origins that answer within topUpEvery: who is away must not hold up those who
// are back. It returns how many have it, and what the others said.
func (x *Index) keepEverywhere(ctx context.Context, r shortRecord) (copies int, err error) {
	ctx, cancel := context.WithTimeout(ctx, topUpEvery)
	defer cancel()
	var mu sync.Mutex
	var errs []error
	var wg sync.WaitGroup
	for _, o := range x.origins.All() {
		if !o.Answers() {
			continue
		}
		wg.Go(func() {
			err := x.putName(ctx, o, r.NameRecord, r.raw)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				errs = append(errs, fmt.Errorf("origin %s: %w", o.ID, err))
			} else {
				copies++
			}
		})
	}
	wg.Wait()
	return copies, errors.Join(errs...)
}

func (x *Index) topUpOnce(ctx context.Context) {
	answer := 0
	for _, o := range x.origins.All() {
		if o.Answers() {
			answer++
		}
	}
	if answer < x.copies() {
		return
	}
	for _, r := range x.short.all() {
		if ctx.Err() != nil || !x.short.has(r) {
			continue
		}
		copies, err := x.keepEverywhere(ctx, r)
		switch {
		case !x.short.has(r): // it has gone into the bucket, or another is in its place: origins forget this one again
			x.forget(context.WithoutCancel(ctx), r.NameRecord)
		case copies >= x.copies():
			x.short.remove(r.NameRecord)
			x.publications.tell(r.Generation)
			x.log.Info("a name is in as many places as configured again", "repository", r.Repository, "tag", r.Tag, "digest", r.Digest)
		default:
			x.log.Debug("a name is still in fewer places than configured", "repository", r.Repository, "tag", r.Tag, "digest", r.Digest, "copies", copies, "error", err)
		}
	}
}
