package buildindex

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// putLayer makes a blob that was pushed a member of the repository. Its second place is the marker of the blob on the
// origins, which names the repository and has no generation. So where the membership was ended before, or it is not
// known whether it was, a record of it goes to the origins, as for a mount: the deletion would win over the marker.
// Where fewer origins owe the blob than there are replicas, the second place is the bucket.
func (x *Index) putLayer(ctx context.Context, repo string, l cluster.Layer) error {
	err := x.mayPush(repo)
	if err == nil {
		err = x.roomForMore()
	}
	if err == nil {
		err = x.addLayer(ctx, repo, l)
	}
	if err != nil {
		return fmt.Errorf("make %s a member of %s: %w", l.Digest, repo, err)
	}
	return nil
}

func (x *Index) addLayer(ctx context.Context, repo string, l cluster.Layer) error {
	n := cluster.MembershipName(repo, l.Digest)
	r, err := x.record(cluster.PutName(n)) // before the wait: what is changed meanwhile is later
	if err != nil {
		return err
	}
	tooFew := l.Copies > 0 && l.Copies < x.copies()
	if tooFew { // first: who sees the membership takes the blob for stored
		if err := x.awaitDurable(ctx, repo, l.Digest); err != nil {
			return err
		}
	}
	unlock, err := x.lock(ctx, repo, l.Digest.String())
	if err != nil {
		return err
	}
	defer unlock()
	ended, err := x.db.Deleted(ctx, n)
	if err != nil {
		return err
	}
	r.Size = l.Size
	if ended > 0 || !x.complete(repo) {
		return x.change(ctx, []cluster.NameRecord{r}, func(tx names.Tx) error { return tx.PutLayer(repo, l.Digest, l.Size, r.Generation) })
	}
	r.Version = unrecorded
	var waits []cluster.NameRecord
	if tooFew {
		waits = append(waits, r)
	}
	published := x.publications.expect(waits)
	defer x.publications.forget(waits)
	err = x.db.Update(ctx, func(tx names.Tx) error {
		return errors.Join(tx.PutLayer(repo, l.Digest, l.Size, r.Generation), x.enqueue(tx, r))
	})
	if err != nil {
		return x.conflict(x.full(err))
	}
	x.wake()
	if err := x.sure(); err != nil { // there is no record of it that origins could have refused
		return err
	}
	return x.awaitBucket(ctx, published)
}

func (x *Index) getLayer(ctx context.Context, repo string, d digest.Digest) (cluster.Layer, error) {
	if x.mirror.foreign(repo) {
		return x.mirror.getLayer(ctx, repo, d)
	}
	l, err := x.layer(ctx, repo, d)
	if errors.Is(err, names.ErrNotFound) {
		return cluster.Layer{}, fmt.Errorf("%w: blob %s of %s", registry.ErrBlobUnknown, d, repo)
	}
	if err != nil {
		return cluster.Layer{}, fmt.Errorf("blob %s of %s: %w", d, repo, err)
	}
	return cluster.Layer{Digest: d, Size: l.Size}, nil
}

// listLayers answers with a page of the members of a repository. While names are restored it is ErrUnavailable, as
// every list.
func (x *Index) listLayers(w http.ResponseWriter, r *http.Request, repo string) error {
	if err := registry.CheckName(repo); err != nil {
		return err
	}
	q := r.URL.Query()
	n, err := strconv.Atoi(cmp.Or(q.Get("n"), strconv.Itoa(cluster.MaxLayers)))
	if err != nil || n < 1 {
		return fmt.Errorf("%w: n is %.20q", registry.ErrPaginationInvalid, q.Get("n"))
	}
	last := digest.Digest(q.Get("last"))
	if last != "" {
		if last, err = blob.ParseDigest(q.Get("last")); err != nil {
			return fmt.Errorf("%w: last: %w", registry.ErrDigestInvalid, err)
		}
	}
	if err := x.requireComplete(repo, "members"); err != nil {
		return err
	}
	list, err := x.db.Layers(r.Context(), repo, last, min(n, cluster.MaxLayers))
	if err != nil {
		return fmt.Errorf("list the members of %s: %w", repo, err)
	}
	out := cluster.LayerList{Layers: make([]cluster.Layer, 0, len(list))}
	for _, m := range list {
		out.Layers = append(out.Layers, cluster.Layer{Digest: m.Digest, Size: m.Size})
	}
	return transport.WriteJSON(w, http.StatusOK, out)
}

// pushed is the change that made a blob that was pushed a member of a repository.
func pushed(repo string, l cluster.Layer, generation int64) cluster.NameRecord {
	r := cluster.NewRecord(cluster.PutName(cluster.MembershipName(repo, l.Digest)).At(generation), time.Now())
	r.Version, r.Size = unrecorded, l.Size
	return r
}

func (x *Index) deleteLayer(ctx context.Context, repo string, d digest.Digest) error {
	if err := x.mayPush(repo); err != nil {
		return err
	}
	unlock, err := x.lock(ctx, repo, d.String())
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := x.layer(ctx, repo, d); err != nil {
		if errors.Is(err, names.ErrNotFound) {
			err = fmt.Errorf("%w: blob %s of %s", registry.ErrBlobUnknown, d, repo)
		}
		return err
	}
	r, err := x.record(cluster.DeleteName(cluster.MembershipName(repo, d)))
	if err != nil {
		return fmt.Errorf("delete blob %s of %s: %w", d, repo, err)
	}
	if err := x.change(ctx, []cluster.NameRecord{r}, func(tx names.Tx) error { return tx.DeleteLayer(repo, d, r.Generation) }); err != nil {
		if errors.Is(err, names.ErrNotFound) {
			return fmt.Errorf("%w: blob %s of %s", registry.ErrBlobUnknown, d, repo)
		}
		return fmt.Errorf("delete blob %s of %s: %w", d, repo, err)
	}
	return nil
}

// mount makes a blob that some repository has a member of this one. From is where the client saw it, a hint: clients
// remember blobs for longer than repositories keep them. Whether the client may pull it the proxy has asked, but for
// what an upstream gives to some alone (mountSource).
func (x *Index) mount(ctx context.Context, repo, from string, d digest.Digest) (cluster.Layer, error) {
	if err := x.mayPush(repo); err != nil {
		return cluster.Layer{}, err
	}
	anywhere, err := x.mirror.mountSource(ctx, d)
	size := anywhere.Size
	if errors.Is(err, names.ErrNotFound) {
		// Never a reason to wait: the client then pushes the bytes.
		return cluster.Layer{}, fmt.Errorf("%w: %s is neither in %q nor in another repository", registry.ErrBlobUnknown, d, from)
	}
	if err != nil {
		return cluster.Layer{}, fmt.Errorf("mount %s from %q: %w", d, from, err)
	}
	if err := x.roomForMore(); err != nil {
		return cluster.Layer{}, fmt.Errorf("mount %s into %s: %w", d, repo, err)
	}
	unlock, err := x.lock(ctx, repo, d.String())
	if err != nil {
		return cluster.Layer{}, err
	}
	defer unlock()
	r, err := x.record(cluster.PutName(cluster.MembershipName(repo, d)))
	if err != nil {
		return cluster.Layer{}, fmt.Errorf("mount %s into %s: %w", d, repo, err)
	}
	r.Size = size
	if err := x.change(ctx, []cluster.NameRecord{r}, func(tx names.Tx) error { return tx.PutLayer(repo, d, size, r.Generation) }); err != nil {
		return cluster.Layer{}, fmt.Errorf("mount %s into %s: %w", d, repo, err)
	}
	return cluster.Layer{Digest: d, Size: size}, nil
}
