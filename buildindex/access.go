package buildindex

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// Kinds of names.AccessEntry.
const (
	kindKey   = "key"
	kindRobot = "robot"
)

// maxKeyLife bounds how long a key of tokens may be valid: what a proxy forgot to take back ends by itself.
const maxKeyLife = 30 * 24 * time.Hour

// serveAccess tells who may come in, unless the asker has that. Hashes of robots' keys are for proxies.
func (x *Index) serveAccess(w http.ResponseWriter, r *http.Request, _ registry.ExtensionPath) error {
	s, err := x.accessState(r.Context())
	if err != nil {
		return fmt.Errorf("read keys and robots: %w", err)
	}
	if !cluster.MayBe(r, transport.RoleProxy) {
		for i := range s.Robots {
			s.Robots[i].Hash = ""
		}
	}
	b, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("tell keys and robots: %w", err)
	}
	sum := sha256.Sum256(b)
	etag := `"` + hex.EncodeToString(sum[:16]) + `"`
	w.Header().Set("ETag", etag)
	if r.Header.Get("If-None-Match") == etag {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	return transport.WriteJSON(w, http.StatusOK, json.RawMessage(b))
}

func (x *Index) putTokenKey(w http.ResponseWriter, r *http.Request, p registry.ExtensionPath) error {
	var k cluster.TokenKey
	if err := readEntry(r, &k); err != nil {
		return err
	}
	if k.ID != p.Key || !cluster.TokenKeyID.MatchString(k.ID) || len(k.JWK) == 0 || k.Expires.After(time.Now().Add(maxKeyLife)) {
		return fmt.Errorf("%w: want the key %.80q, with an end", errBody, p.Key)
	}
	k.Owner = ownerOf(r)
	drop, err := x.keysTooMany(r.Context(), k)
	if err != nil {
		return fmt.Errorf("read keys: %w", err)
	}
	return x.putEntry(w, r, names.AccessEntry{Kind: kindKey, Name: k.ID, Expires: k.Expires.Unix()}, k, drop...)
}

// ownerOf returns whose certificate a request has, or else from which address it comes.
func ownerOf(r *http.Request) string {
	if p, ok := cluster.Caller(r.Context()); ok && p.ID != "" {
		return p.String()
	}
	return transport.SourceOf(r.RemoteAddr)
}

// keysTooMany returns the keys that go when k comes: of those of its owner, and of all, that end first. A proxy that
// signs puts its key again and again, so that these are of proxies that are gone. A key is never refused: who can't put
// one can let nobody in.
func (x *Index) keysTooMany(ctx context.Context, k cluster.TokenKey) (drop []string, err error) {
	all, err := entries[cluster.TokenKey](ctx, x.db, kindKey)
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(o cluster.TokenKey) bool { return o.ID == k.ID })
	slices.SortFunc(all, func(a, b cluster.TokenKey) int { return b.Expires.Compare(a.Expires) })
	own, kept := 0, 0
	for _, o := range all {
		if o.Owner == k.Owner {
			own++
		}
		if o.Owner == k.Owner && own >= cluster.MaxOwnKeys || kept >= cluster.MaxTokenKeys-1 {
			drop = append(drop, o.ID)
			continue
		}
		kept++
	}
	return drop, nil
}

func (x *Index) putRobot(w http.ResponseWriter, r *http.Request, p registry.ExtensionPath) error {
	var b cluster.Robot
	if err := readEntry(r, &b); err != nil {
		return err
	}
	if b.Name != p.Key || !cluster.RobotName.MatchString(b.Name) || !cluster.RobotHash.MatchString(b.Hash) || b.Expires.IsZero() {
		return fmt.Errorf("%w: want the robot %.80q, with the hash of its key and its end", errBody, p.Key)
	}
	if err := x.roomForRobot(r.Context(), b); err != nil {
		return err
	}
	b.Generation, b.Created = rand.Text(), time.Now().UTC().Truncate(time.Second)
	return x.putEntry(w, r, names.AccessEntry{Kind: kindRobot, Name: b.Name, Expires: b.Expires.Unix()}, b)
}

func (x *Index) deleteRobot(w http.ResponseWriter, r *http.Request, p registry.ExtensionPath) error {
	err := x.db.Update(r.Context(), func(tx names.Tx) error { return tx.DeleteAccess(kindRobot, p.Key) })
	if errors.Is(err, names.ErrNotFound) {
		return fmt.Errorf("%w: there is no robot %.80q", registry.ErrNameUnknown, p.Key)
	}
	if err != nil {
		return fmt.Errorf("revoke robot %s: %w", p.Key, x.full(err))
	}
	x.log.Info("a robot was revoked", "robot", p.Key)
	w.WriteHeader(http.StatusAccepted)
	return nil
}

func readEntry(r *http.Request, into any) error {
	b, err := io.ReadAll(io.LimitReader(r.Body, cluster.MaxAccessEntry+1))
	if err == nil && len(b) > cluster.MaxAccessEntry {
		err = fmt.Errorf("more than %d bytes", cluster.MaxAccessEntry)
	}
	if err == nil {
		err = json.Unmarshal(b, into)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errBody, err)
	}
	return nil
}

// putEntry writes an entry with the value v, and drops others of its kind, and those that have ended.
func (x *Index) putEntry(w http.ResponseWriter, r *http.Request, e names.AccessEntry, v any, drop ...string) (err error) {
	if e.Value, err = json.Marshal(v); err != nil {
		return fmt.Errorf("%w: %w", errBody, err)
	}
	err = x.db.Update(r.Context(), func(tx names.Tx) error {
		for _, name := range drop {
			if err := tx.DeleteAccess(e.Kind, name); err != nil && !errors.Is(err, names.ErrNotFound) {
				return err
			}
		}
		return errors.Join(tx.DropAccess(time.Now().Unix()), tx.PutAccess(e))
	})
	if err != nil {
		return fmt.Errorf("keep %s %s: %w", e.Kind, e.Name, x.full(err))
	}
	w.WriteHeader(http.StatusCreated)
	return nil
}

// roomForRobot returns registry.ErrTooManyRequests for a robot that would be one too many, or make all of them more
// than can be told at once.
func (x *Index) roomForRobot(ctx context.Context, b cluster.Robot) error {
	have, err := x.db.Access(ctx, kindRobot)
	if err != nil {
		return fmt.Errorf("read robots: %w", err)
	}
	live, size, now := 0, 0, time.Now().Unix()
	for _, h := range have {
		if h.Name != b.Name && (h.Expires == 0 || h.Expires >= now) {
			live, size = live+1, size+len(h.Value)
		}
	}
	if live >= cluster.MaxRobots || size+cluster.MaxAccessEntry > cluster.MaxRobotsSize {
		return fmt.Errorf("%w: there are %d of them, with %d bytes", registry.ErrTooManyRequests, live, size)
	}
	return nil
}

// accessState returns the keys and robots that have not ended.
func (x *Index) accessState(ctx context.Context) (s cluster.AccessState, err error) {
	s.Keys, err = entries[cluster.TokenKey](ctx, x.db, kindKey)
	if err == nil {
		s.Robots, err = entries[cluster.Robot](ctx, x.db, kindRobot)
	}
	return s, err
}

func entries[T any](ctx context.Context, db names.Store, kind string) ([]T, error) {
	es, err := db.Access(ctx, kind)
	if err != nil {
		return nil, err
	}
	out, now := []T{}, time.Now().Unix()
	for _, e := range es {
		var v T
		if e.Expires != 0 && e.Expires < now {
			continue
		}
		if err := json.Unmarshal(e.Value, &v); err != nil {
			return nil, fmt.Errorf("%s %s: %w", kind, e.Name, err)
		}
		out = append(out, v)
	}
	return out, nil
}

// listHolders answers with a page of the repositories that have a blob. While names are restored some may be missing: a
// mount that finds none is an upload.
func (x *Index) listHolders(w http.ResponseWriter, r *http.Request, p registry.ExtensionPath) error {
	d, err := blob.ParseDigest(p.Key)
	if err != nil {
		return fmt.Errorf("%w: %w", registry.ErrDigestInvalid, err)
	}
	q := r.URL.Query()
	n, err := strconv.Atoi(cmp.Or(q.Get("n"), strconv.Itoa(cluster.MaxMembers)))
	if err != nil || n < 1 {
		return fmt.Errorf("%w: n is %.20q", registry.ErrPaginationInvalid, q.Get("n"))
	}
	all, err := x.db.LayerRepositories(r.Context(), d, q.Get("last"), min(n, cluster.MaxMembers))
	if err != nil {
		return fmt.Errorf("list the repositories of %s: %w", d, err)
	}
	return transport.WriteJSON(w, http.StatusOK, cluster.RepositoryPage{Repositories: all})
}

// members answers which of some blobs are members of a repository.
func (x *Index) members(w http.ResponseWriter, r *http.Request, p registry.ExtensionPath) error {
	repo := p.Repository
	if err := registry.CheckName(repo); err != nil {
		return err
	}
	var asked cluster.Members
	b, err := io.ReadAll(io.LimitReader(r.Body, cluster.MaxMembers*200))
	if err == nil {
		err = json.Unmarshal(b, &asked)
	}
	if err != nil || len(asked.Digests) > cluster.MaxMembers {
		return fmt.Errorf("%w: want at most %d digests", errBody, cluster.MaxMembers)
	}
	out := cluster.Members{Digests: []digest.Digest{}}
	for _, d := range asked.Digests {
		if _, err := blob.ParseDigest(d.String()); err != nil {
			return fmt.Errorf("%w: %w", registry.ErrDigestInvalid, err)
		}
		switch err := x.member(r.Context(), repo, d); {
		case err == nil:
			out.Digests = append(out.Digests, d)
		case !errors.Is(err, names.ErrNotFound):
			return fmt.Errorf("members of %s: %w", repo, err)
		}
	}
	return transport.WriteJSON(w, http.StatusOK, out)
}
