package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/anacrolix/torrent/bencode"
	"github.com/anacrolix/torrent/metainfo"
	"github.com/opencontainers/go-digest"

	"kraken/deploy/devcluster"
	"kraken/origin/store"
	"kraken/proto/announce"
	"kraken/test/bench/report"
)

func infoBytes(i metainfo.Info) ([]byte, error) { return bencode.Marshal(i) }

// firstByte is the time to the first byte of a blob that an agent lacks. Every measurement has a new agent with an
// empty cache.
func firstByte(b *bench, ctx context.Context) (err error) {
	c, err := b.newCluster(ctx, options{agents: 1})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	blob, err := c.push(ctx, 1<<30)
	if err != nil {
		return err
	}
	var all []float64
	for range 20 {
		if err := c.renew(ctx); err != nil {
			return err
		}
		d, err := c.oneByte(ctx, blob)
		if err != nil {
			return err
		}
		all = append(all, d.Seconds()*1000)
	}
	b.add(report.AtMost("first byte of 1 GiB", map[string]any{"n": len(all)}, report.Median(all), "ms", 50, nil))
	return nil
}

func (c *cluster) oneByte(ctx context.Context, b blobOf) (time.Duration, error) {
	a := c.agents[0]
	hc := a.Host().Client()
	defer hc.CloseIdleConnections()
	began := time.Now()
	resp, err := hc.Get(c.plan.URL(a) + "/v2/" + repository + "/blobs/" + b.digest.String())
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if _, err := io.ReadFull(resp.Body, make([]byte, 1)); err != nil {
		return 0, fmt.Errorf("%s: %w", resp.Status, err)
	}
	return time.Since(began), ctx.Err()
}

// small is blobs of 10 KiB that the agent lacks, as layers of an image whose manifest it has just answered.
func small(b *bench, ctx context.Context) (err error) {
	const n, clients = 1000, 16
	c, err := b.newCluster(ctx, options{agents: 1})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	layers, err := c.pushImage(ctx, "v1", n)
	if err != nil {
		return err
	}
	a := c.agents[0]
	hc := a.Host().Client()
	hc.Transport.(*http.Transport).MaxIdleConnsPerHost = clients
	base := c.plan.URL(a) + "/v2/" + repository
	if _, err := get(ctx, hc, base+"/manifests/v1", ""); err != nil {
		return err
	}
	if err := c.published(ctx); err != nil {
		return err
	}
	var took []float64
	for _, d := range layers {
		p, err := get(ctx, hc, base+"/blobs/"+d.String(), d)
		if err != nil {
			return err
		}
		took = append(took, p.took.Seconds()*1000)
	}
	b.add(report.AtMost("blob of 10 KiB", map[string]any{"n": n}, report.Median(took), "ms", 5, nil))
	var rates []float64
	for k := range b.repeat {
		tag := fmt.Sprintf("v2-%d", k)
		if layers, err = c.pushImage(ctx, tag, n); err != nil {
			return err
		}
		if _, err := get(ctx, hc, base+"/manifests/"+tag, ""); err != nil {
			return err
		}
		if err := c.published(ctx); err != nil {
			return err
		}
		began := time.Now()
		errs := make([]error, clients)
		var wg sync.WaitGroup
		for i := range clients {
			wg.Go(func() {
				for k := i; k < len(layers) && errs[i] == nil; k += clients {
					_, errs[i] = get(ctx, hc, base+"/blobs/"+layers[k].String(), layers[k])
				}
			})
		}
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			return err
		}
		rates = append(rates, n/time.Since(began).Seconds())
	}
	b.add(report.AtLeast("blobs of 10 KiB a second", map[string]any{"n": n, "clients": clients}, report.Median(rates), "/s", 2000, nil))
	return nil
}

// published waits until the build-index has written to the bucket what was pushed, some thousand files with an fsync
// each, which is no part of a pull.
func (c *cluster) published(ctx context.Context) error {
	const name = "kraken_build_index_outbox_rows "
	index := c.only("build-index")
	hc := index.Host().Client()
	defer hc.CloseIdleConnections()
	return eventually(ctx, time.Minute, "the build-index has written to the bucket what was pushed", func() (bool, error) {
		resp, err := hc.Get("http://" + index.Admin + "/metrics")
		if err != nil {
			return false, err
		}
		text, err := io.ReadAll(resp.Body)
		if err := errors.Join(err, resp.Body.Close()); err != nil {
			return false, err
		}
		_, rows, found := strings.Cut("\n"+string(text), "\n"+name)
		if !found {
			return false, fmt.Errorf("the build-index has no metric %s", name)
		}
		return strings.HasPrefix(rows, "0\n"), nil
	})
}

// pushImage pushes an image of n layers of 10 KiB.
func (c *cluster) pushImage(ctx context.Context, tag string, n int) ([]digest.Digest, error) {
	proxy := c.only("proxy")
	hc := proxy.Host().Client()
	defer hc.CloseIdleConnections()
	base := c.plan.URL(proxy)
	type descriptor struct {
		MediaType string        `json:"mediaType"`
		Digest    digest.Digest `json:"digest"`
		Size      int64         `json:"size"`
	}
	config := []byte("{}")
	if err := pushTo(ctx, hc, base, digest.FromBytes(config), int64(len(config)), bytes.NewReader(config)); err != nil {
		return nil, err
	}
	m := struct {
		SchemaVersion int          `json:"schemaVersion"`
		MediaType     string       `json:"mediaType"`
		Config        descriptor   `json:"config"`
		Layers        []descriptor `json:"layers"`
	}{2, "application/vnd.oci.image.manifest.v1+json", descriptor{"application/vnd.oci.image.config.v1+json", digest.FromBytes(config), 2}, nil}
	var out []digest.Digest
	for range n {
		b, err := newBlob(10 << 10)
		if err != nil {
			return nil, err
		}
		if err := pushTo(ctx, hc, base, b.digest, b.size, b.reader()); err != nil {
			return nil, err
		}
		out = append(out, b.digest)
		m.Layers = append(m.Layers, descriptor{"application/vnd.oci.image.layer.v1.tar", b.digest, b.size})
	}
	text, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, base+"/v2/"+repository+"/manifests/"+tag, bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", m.MediaType)
	return out, expect(hc, req, http.StatusCreated)
}

// memoryIdle is what an agent takes that holds 10,000 blobs which peers can ask for, and has nothing to do.
func memoryIdle(b *bench, ctx context.Context) (err error) {
	const n, size = 10_000, 8 << 10
	c, err := b.newCluster(ctx, options{agents: 1, config: map[string]map[string]any{"agent": {"small_blob": "4KiB"}}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	a := c.agents[0]
	if err := c.plan.Stop(ctx, a.Name); err != nil {
		return err
	}
	if err := fill(ctx, c.plan.StateDir(a), n, size); err != nil {
		return err
	}
	if err := c.plan.Start(ctx, a.Name); err != nil {
		return err
	}
	// Two announce intervals of the default 10 s are part of being idle.
	select {
	case <-time.After(25 * time.Second):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	rss, err := devcluster.Memory(a.PID(), "VmRSS")
	if err != nil {
		return err
	}
	peak, err := devcluster.Memory(a.PID(), "VmHWM")
	b.add(report.AtMost("agent's memory, idle", map[string]any{"blobs": n}, float64(rss)/mib, "MiB", 64, map[string]any{"peak": float64(peak) / mib}))
	return err
}

// fill puts blobs into an agent's cache as pulls would have.
func fill(ctx context.Context, dir string, n int, size int64) error {
	s, err := store.Open(store.Config{Dir: dir})
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	errs := make([]error, 16)
	for i := range errs {
		wg.Go(func() {
			for k := i; k < n && errs[i] == nil; k += len(errs) {
				b, err := newBlob(size)
				if err == nil {
					_, err = s.Ingest(ctx, b.digest, size, b.reader(), nil)
				}
				if err == nil {
					_, err = s.ComputeMetainfo(ctx, b.digest)
				}
				errs[i] = err
			}
		})
	}
	wg.Wait()
	return errors.Join(append(errs, s.Close())...)
}

func memoryPull(b *bench, ctx context.Context) (err error) {
	c, err := b.newCluster(ctx, options{agents: 1})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	blob, err := c.push(ctx, 4<<30)
	if err != nil {
		return err
	}
	if _, err := c.pull(ctx, c.agents[0], blob); err != nil {
		return err
	}
	peak, err := devcluster.Memory(c.agents[0].PID(), "VmHWM")
	b.add(report.AtMost("agent's memory, pulling 4 GiB", nil, float64(peak)/mib, "MiB", 200, nil))
	return err
}

// tracker announces blobs in batches to a tracker that has one core.
func tracker(b *bench, ctx context.Context) (err error) {
	// one client plays all peers
	keys := map[string]any{"trust_announced_ip": true, "limits": map[string]any{"source_pairs": 1_000_000}}
	c, err := b.newCluster(ctx, options{env: map[string][]string{"tracker": {"GOMAXPROCS=1"}}, config: map[string]map[string]any{"tracker": keys}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	p := c.only("tracker")
	empty, err := devcluster.Memory(p.PID(), "VmRSS")
	if err != nil {
		return err
	}
	const peers, batches, batch, workers = 500, 10, 100, 4 // 500,000 pairs of 5,000 blobs with 100 peers each
	digests := make([]digest.Digest, 5000)
	for i := range digests {
		digests[i] = digest.FromString(fmt.Sprint("blob ", i))
	}
	hc := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: workers}}
	client := announce.NewClient(c.plan.URL(p), hc)
	announceAll := func() (float64, time.Duration, error) {
		began := time.Now()
		before, err := devcluster.CPU(p.PID())
		if err != nil {
			return 0, 0, err
		}
		err = together(workers, func(w int) (err error) {
			for k := w; k < peers && err == nil; k += workers {
				for j := 0; j < batches && err == nil; j++ {
					err = announceBatch(ctx, client, k, digests, j*batch, batch)
				}
			}
			return err
		})
		after, cpuErr := devcluster.CPU(p.PID())
		return peers * batches * batch / time.Since(began).Seconds(), after - before, errors.Join(err, cpuErr)
	}
	if _, _, err := announceAll(); err != nil {
		return err
	}
	full, err := devcluster.Memory(p.PID(), "VmRSS")
	if err != nil {
		return err
	}
	var rates, cpu []float64
	for range b.repeat {
		rate, used, err := announceAll()
		if err != nil {
			return err
		}
		rates, cpu = append(rates, rate), append(cpu, used.Seconds())
	}
	took, err := timed(1000, func(k int) error { return announceBatch(ctx, client, k%peers, digests, k%batches*batch, 1) })
	if err != nil {
		return err
	}
	const pairs = peers * batches * batch
	b.add(report.AtMost("tracker's answer", map[string]any{"n": len(took), "cores": 1}, report.Median(took), "ms", 1,
		map[string]any{"p99": took[len(took)*99/100]}),
		report.AtLeast("announces a second", map[string]any{"batch": batch, "cores": 1}, report.Median(rates), "/s", 50_000,
			map[string]any{"by_cpu": pairs / report.Median(cpu)}),
		report.AtMost("tracker's memory of a (peer, blob) pair", map[string]any{"pairs": pairs}, float64(full-empty)/pairs, "bytes", 128,
			map[string]any{"empty_mib": float64(empty) / mib}))
	return nil
}

// together calls f for each of n workers at once and waits for all.
func together(n int, f func(worker int) error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for w := range n {
		wg.Go(func() { errs[w] = f(w) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// timed calls f n times, one after another, as a pull waits for its questions, and returns the milliseconds that each
// took, sorted.
func timed(n int, f func(k int) error) ([]float64, error) {
	var took []float64
	for k := range n {
		began := time.Now()
		if err := f(k); err != nil {
			return nil, err
		}
		took = append(took, time.Since(began).Seconds()*1000)
	}
	slices.Sort(took)
	return took, nil
}

func announceBatch(ctx context.Context, client *announce.Client, peer int, digests []digest.Digest, from, n int) error {
	var id [20]byte
	copy(id[:], fmt.Sprintf("-KN0001-%012d", peer))
	req := announce.Request{Version: announce.Version, Peer: announce.Peer{
		ID: hex.EncodeToString(id[:]), Addr: []string{fmt.Sprintf("10.%d.%d.7:16062", peer/250, peer%250)}, Node: fmt.Sprint("node-", peer),
	}}
	for k := range n {
		d := digests[(peer*37+from+k)%len(digests)]
		// Most of what an agent announces it has; one in ten it still wants.
		s := announce.BlobState{Digest: d, Repository: repository, Size: 64 * mib}
		if k%10 == 0 {
			s.Left, s.Want = mib, true
		}
		req.Blobs = append(req.Blobs, s)
	}
	_, err := client.Announce(ctx, req)
	return err
}
