package buildindex

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"kraken/buildindex/names"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

const (
	metaAside = "set_aside" // JSON of the name records that are set aside
	// maxAsideRecords bounds how many are remembered by name; more are only counted.
	maxAsideRecords = 1_000

	rowRetryFirst = time.Second // before an outbox row that failed for itself is tried again; doubles
	rowRetryMax   = time.Minute
)

// asideRecord is a name record at an origin that was not adopted. It stays where it is, is looked at again in every
// round, and is taken back by nobody but an operator.
type asideRecord struct {
	cluster.SetAside
	Key string `json:"key"`
}

// asideRow is an outbox row that failed for a reason of its own.
type asideRow struct {
	cluster.SetAside
	tries int
}

// aside is what can't go on for a reason of its own, while everything else does.
type aside struct {
	mu      sync.Mutex
	records []asideRecord
	more    int // records beyond maxAsideRecords
	rows    map[int64]*asideRow
}

func describe(where string, r cluster.NameRecord, err error) cluster.SetAside {
	return cluster.SetAside{
		Where: where, Kind: cut(r.Kind), Repository: cut(r.Repository), Tag: cut(r.Tag), Digest: r.Digest[:min(len(r.Digest), 150)],
		Generation: r.Generation, Error: err.Error(), Since: time.Now().UTC(),
	}
}

// cut bounds what a stranger may have written.
func cut(s string) string { return s[:min(len(s), 256)] }

// load reads what an earlier process set aside. Others may list it meanwhile.
func (a *aside) load(ctx context.Context, db names.Store) error {
	v, err := db.Meta(ctx, metaAside)
	var records []asideRecord
	if err == nil && v != "" {
		err = json.Unmarshal([]byte(v), &records)
	}
	if err != nil {
		return fmt.Errorf("records that were set aside: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.records, a.rows = records, map[int64]*asideRow{}
	return nil
}

// has reports whether a record of this key and generation is set aside.
func (a *aside) has(key string, generation int64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.ContainsFunc(a.records, func(r asideRecord) bool { return r.Key == key && r.Generation == generation })
}

// replace takes the records set aside at the origins that were heard in this round; those of others stay. It returns
// the ones that are new, and whether anything has changed.
func (a *aside) replace(heard []string, now []asideRecord) (fresh []asideRecord, changed bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []asideRecord
	for _, r := range a.records {
		if !slices.Contains(heard, r.Where) {
			out = append(out, r)
		}
	}
	for _, r := range now {
		i := slices.IndexFunc(a.records, func(o asideRecord) bool { return o.Where == r.Where && o.Key == r.Key && o.Generation == r.Generation })
		if i >= 0 {
			r.Since = a.records[i].Since
		} else {
			fresh = append(fresh, r)
		}
		out = append(out, r)
	}
	a.more = max(0, len(out)-maxAsideRecords)
	out = out[:len(out)-a.more]
	changed = len(fresh) > 0 || len(out) != len(a.records)
	a.records = out
	return fresh, changed
}

// save makes the list durable: a record on it is not taken back when later changes have raised the counter above it.
func (a *aside) save(ctx context.Context, db names.Store) error {
	return db.Update(ctx, func(tx names.Tx) error {
		a.mu.Lock() // inside the write: of two the later one has the later list
		b, err := json.Marshal(a.records)
		a.mu.Unlock()
		return errors.Join(err, tx.SetMeta(metaAside, string(b)))
	})
}

// due reports whether an outbox row may be tried now.
func (a *aside) due(id int64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.rows[id]
	return r == nil || !time.Now().Before(r.Next)
}

// failed sets an outbox row aside until a later time. first is true for one that had not failed before.
func (a *aside) failed(row names.OutboxRow, err error) (first bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.rows[row.ID]
	if first = r == nil; first {
		r = &asideRow{SetAside: describe("outbox", row.Record, err)}
		a.rows[row.ID] = r
	}
	longest := rowRetryMax
	if errors.Is(err, registry.ErrUnavailable) {
		longest = outboxMax // origins come back
	}
	r.Error = err.Error()
	r.Next = time.Now().Add(min(rowRetryFirst<<min(r.tries, 10), longest)).UTC()
	r.tries++
	return first
}

// done forgets an outbox row.
func (a *aside) done(id int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.rows, id)
}

// list returns up to n of what is set aside, oldest first, and how many there are.
func (a *aside) list(n int) (out []cluster.SetAside, count int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, r := range a.records {
		out = append(out, r.SetAside)
	}
	for _, r := range a.rows {
		out = append(out, r.SetAside)
	}
	count = len(out) + a.more
	slices.SortFunc(out, func(x, y cluster.SetAside) int {
		return cmp.Or(x.Since.Compare(y.Since), cmp.Compare(x.Generation, y.Generation))
	})
	return out[:min(n, len(out))], count
}

// check is what readiness says of it.
func (a *aside) check(context.Context) error {
	l, n := a.list(1)
	if n == 0 {
		return nil
	}
	return fmt.Errorf("%d changes or records are set aside, see /writeback; the oldest is of %s:%s %s (%s): %s", n, l[0].Repository, l[0].Tag, l[0].Digest, l[0].Where, l[0].Error)
}
