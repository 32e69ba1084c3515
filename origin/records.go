package origin

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"kraken/origin/store"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// putName stores a record that holds. What is held already stays if it holds too and is not older. A build-index that
// stood still while another took over must not go on: what says which it is is refused then.
func (o *Origin) putName(w http.ResponseWriter, r *http.Request, x registry.ExtensionPath) error {
	if err := o.holder.admits(r.URL.Query().Get("holder"), time.Now()); err != nil {
		return err
	}
	body, err := readBody(r, cluster.MaxNameRecord)
	if err != nil {
		return err
	}
	rec, err := cluster.ParseNameRecord(body, o.nameKeys, time.Now())
	if err == nil && (x.Key != cluster.NameKey(rec) || x.Repository != rec.Repository) {
		err = fmt.Errorf("%w: the record does not belong to this key", registry.ErrRecordInvalid)
	}
	if err != nil {
		o.m.namesRefused.Inc()
		o.refusals.Do(func() { o.log.Warn("a name record was refused", "client", r.RemoteAddr, "error", err) })
		return err
	}
	if len(o.nameKeys) == 0 {
		o.unsigned.Do(func() {
			o.log.Warn("name records are taken without a signature, because no record_keys are configured: whoever reaches this listener can write them")
		})
	}
	var line bytes.Buffer // a record is one line wherever it goes
	if err := json.Compact(&line, body); err != nil {
		return fmt.Errorf("%w: %w", registry.ErrRecordInvalid, err)
	}
	stays := false
	err = o.store.ChangeName(x.Key, func(held []byte, err error) (store.NameChange, []byte) {
		if old, err := o.parseHeld(held, err); err == nil && !rec.Change().Wins(old.Change()) {
			stays = true
			return store.LeaveName, nil
		}
		return store.ReplaceName, line.Bytes()
	})
	if err != nil {
		return wire(err)
	}
	if !stays {
		w.WriteHeader(http.StatusCreated)
	}
	return nil
}

func (o *Origin) deleteName(w http.ResponseWriter, r *http.Request, x registry.ExtensionPath) error {
	q := r.URL.Query()
	if err := o.holder.admits(q.Get("holder"), time.Now()); err != nil {
		return err
	}
	gen, err := strconv.ParseInt(q.Get("generation"), 10, 64)
	if err != nil {
		return fmt.Errorf("%w: want ?generation=<number>, the newest that may be forgotten, got %.30q", errBody, q.Get("generation"))
	}
	signature, err := base64.RawURLEncoding.DecodeString(q.Get("signature"))
	if err != nil {
		return fmt.Errorf("%w: want signature=<base64url without padding>, got %.100q", errBody, q.Get("signature"))
	}
	if err := o.nameKeys.VerifyDeletion(cluster.NameDeletion{Repository: x.Repository, Key: x.Key, Generation: gen, Signature: signature}); err != nil {
		o.m.namesRefused.Inc()
		o.refusals.Do(func() { o.log.Warn("the deletion of a name record was refused", "client", r.RemoteAddr, "error", err) })
		return err
	}
	err = o.store.ChangeName(x.Key, func(held []byte, err error) (store.NameChange, []byte) {
		// Also a record that does not hold: build-index has seen it and decided.
		if old, err := o.parseHeld(held, err); errors.Is(err, store.ErrNotFound) || old.Generation > gen {
			return store.LeaveName, nil
		}
		return store.RemoveName, nil
	})
	if err != nil {
		return wire(err)
	}
	w.WriteHeader(http.StatusAccepted)
	return nil
}

// parseHeld checks a record that is held, as store.Name returned it, like one that comes in. What it returns beside an
// error other than store.ErrNotFound is what could be read of one that does not hold.
func (o *Origin) parseHeld(b []byte, err error) (cluster.NameRecord, error) {
	if err != nil {
		return cluster.NameRecord{}, err
	}
	return cluster.ParseNameRecord(b, o.nameKeys, time.Now())
}

// allNames answers with all records as they are: build-index checks them, and says which it sets aside. One that can't
// be read is counted.
func (o *Origin) allNames(w http.ResponseWriter, _ *http.Request, _ registry.ExtensionPath) error {
	keys := o.store.Names()
	w.Header().Set("Content-Type", "application/x-ndjson")
	unreadable := 0
	defer func() { o.unreadable.Store(int64(unreadable)) }()
	for _, k := range keys {
		b, err := o.store.Name(k)
		if errors.Is(err, store.ErrNotFound) {
			continue // forgotten meanwhile
		}
		var line bytes.Buffer
		if err == nil {
			err = json.Compact(&line, b)
		}
		if err == nil && line.Len() > cluster.MaxNameRecord {
			err = fmt.Errorf("it has %d bytes", line.Len())
		}
		if err != nil {
			unreadable++
			o.log.Warn("a name record can't be read", "key", k, "error", err)
			continue
		}
		var rec cluster.NameRecord
		if json.Unmarshal(line.Bytes(), &rec) != nil || cluster.NameKey(rec) != k {
			o.refusals.Do(func() { o.log.Warn("a name record stands under a key that is not its own", "key", k) })
		}
		line.WriteByte('\n')
		if _, err := w.Write(line.Bytes()); err != nil {
			return ignoreWrite(err)
		}
	}
	return nil
}

// checkNames is what readiness says of the records that are held.
func (o *Origin) checkNames(context.Context) error {
	if n := o.unreadable.Load(); n > 0 {
		return fmt.Errorf("%d name records can't be read, the log names them", n)
	}
	if len(o.nameKeys) == 0 {
		return errors.New("no record_keys are configured: name records are believed without a signature")
	}
	return nil
}
