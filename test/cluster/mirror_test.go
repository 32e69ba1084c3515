package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/cluster"
	"kraken/proto/registry"
	scripted "kraken/test/upstream"
)

// mirroring returns a cluster that mirrors up, and how it calls up's repository library/nginx.
func mirroring(t *testing.T, origins, agents int, up *scripted.Registry, keys map[string]any) (c *Cluster, repo string) {
	t.Helper()
	entry := map[string]any{"registry": up.Host, "plain_http": true, "tag_ttl": "1s"}
	for k, v := range keys {
		entry[k] = v
	}
	return NewMirror(t, origins, agents, map[string]any{"registries": []any{entry}, "allow_addresses": []any{"127.0.0.1/32"}}), up.Alias + "/" + nginx
}

const nginx = "library/nginx"

// On a cluster of certificates a blob of an upstream is fetched once, by whichever origin is asked, and agents trade it
// while it arrives.
func TestUpstreamBlobsWithMutualTLS(t *testing.T) {
	b := noise(6<<20, 21)
	up := scripted.New(t, scripted.Options{Rate: 4 << 20})
	up.PutBlob(nginx, b)
	c := NewMutualTLSMirror(t, 2, 2, map[string]any{
		"registries": []any{map[string]any{"registry": up.Host, "plain_http": true}}, "allow_addresses": []any{"127.0.0.1/32"},
	})
	repo, d := up.Alias+"/"+nginx, digest.FromBytes(b)
	for _, url := range c.OriginURLs {
		for _, role := range []string{"origin-77", "agent-77"} {
			o := c.originClient(t, url, role)
			if _, err := o.Arriving(t.Context(), repo, digest.FromString("nothing"), cluster.ArrivingRequest{}); !errors.Is(err, registry.ErrBlobUnknown) {
				t.Errorf("%s asks how far a blob is that is nowhere: %v", role, err)
			}
		}
		got, err := readBlob(t.Context(), c.originClient(t, url, "agent-77").Client, repo, d)
		if err != nil || !bytes.Equal(got, b) {
			t.Errorf("an origin sent %d of %d bytes: %v", len(got), len(b), err)
		}
	}
	cold := noise(6<<20, 22)
	layer := up.PutBlob(nginx, cold)
	config := up.PutBlob(nginx, []byte("{}"))
	m := up.PutManifest(nginx, "1.27", v1.MediaTypeImageManifest, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":2},"layers":[{"mediaType":%q,"digest":%q,"size":%d}]}`,
		v1.MediaTypeImageManifest, v1.MediaTypeImageConfig, config.Digest, v1.MediaTypeImageLayer, layer.Digest, len(cold)))
	for who, r := range map[string]*registry.Client{"an agent": c.Agents[0], "another agent": c.Agents[1], "a proxy": c.Proxy} {
		got, err := r.GetManifest(t.Context(), repo, registry.Reference{Tag: "1.27"}, registry.GetOptions{})
		if err != nil || got.Digest != m.Digest {
			t.Errorf("%s has the tag as %v, %v", who, got, err)
		}
	}
	pullAll(t, c, repo, cold)
	wantBlob(t, c.Proxy, repo, cold)
	for _, d := range []digest.Digest{d, digest.FromBytes(cold)} {
		if all, _ := gets(up, d); all != 1 {
			t.Errorf("the upstream was asked for %s %d times", d, all)
		}
	}
}

// pullAll has all agents read a blob at once.
func pullAll(t *testing.T, c *Cluster, repo string, b []byte) {
	t.Helper()
	var wg sync.WaitGroup
	for i, a := range c.Agents {
		wg.Go(func() {
			got, err := readBlob(t.Context(), a, repo, digest.FromBytes(b))
			if err != nil || !bytes.Equal(got, b) {
				t.Errorf("agent %d: %d of %d bytes: %v", i+1, len(got), len(b), err)
			}
		})
	}
	wg.Wait()
}

// gets returns how many GETs of a blob an upstream answered, logins apart, and how many of them were for its begin.
func gets(up *scripted.Registry, d digest.Digest) (all, begins int) {
	for _, q := range up.Requests() {
		if q.Kind == "blob" && q.Method == http.MethodGet && q.Status != http.StatusUnauthorized && q.Reference == d.String() {
			all++
			if q.Range == "" {
				begins++
			}
		}
	}
	return all, begins
}

func TestUpstreamBlobIsFetchedOnce(t *testing.T) {
	large, small := noise(6<<20, 1), noise(3000, 2)
	up := scripted.New(t, scripted.Options{Token: true, Anonymous: true, Storage: true, Rate: 4 << 20})
	up.PutBlob(nginx, large)
	up.PutBlob(nginx, small)
	c, repo := mirroring(t, 3, 4, up, nil)
	for _, b := range [][]byte{large, small} {
		pullAll(t, c, repo, b)
		if all, _ := gets(up, digest.FromBytes(b)); all != 1 {
			t.Errorf("a blob of %d bytes was asked for %d times", len(b), all)
		}
	}
	up.Stop()
	pullAll(t, c, repo, large)
	for _, url := range c.OriginURLs {
		if got, err := readBlob(t.Context(), originClient(t, url).Client, repo, digest.FromBytes(large)); err != nil || !bytes.Equal(got, large) {
			t.Errorf("origin without upstream: %d bytes, %v", len(got), err)
		}
	}
}

func TestUpstreamLacksABlob(t *testing.T) {
	up := scripted.New(t, scripted.Options{})
	c, repo := mirroring(t, 2, 1, up, nil)
	if _, err := readBlob(t.Context(), c.Agents[0], repo, digest.FromString("nothing")); !errors.Is(err, registry.ErrBlobUnknown) {
		t.Errorf("a blob that is nowhere: %v", err)
	}
}

// However many ask about a blob, an origin asks the upstream once: how large it is, and whether there is one. A second
// origin asks, too, where the first one is slow to answer.
func TestUpstreamIsAskedAboutABlobOnce(t *testing.T) {
	b := noise(30_000, 21)
	up := scripted.New(t, scripted.Options{})
	d := up.PutBlob(nginx, b).Digest
	c, repo := mirroring(t, 2, 2, up, nil)
	asked := func(d digest.Digest) (n int) {
		for _, q := range up.Requests() {
			if q.Reference == d.String() {
				n++
			}
		}
		return n
	}
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			if desc, err := c.Agents[i%2].StatBlob(t.Context(), repo, d); err != nil || desc.Size != int64(len(b)) {
				t.Errorf("HEAD: %v %v", desc, err)
			}
		})
	}
	wg.Wait()
	if n := asked(d); n < 1 || n > len(c.OriginURLs) {
		t.Errorf("40 HEADs are %d requests", n)
	}
	missing := digest.FromString("nothing")
	for i := range 40 {
		wg.Go(func() {
			if _, err := readBlob(t.Context(), c.Agents[i%2], repo, missing); !errors.Is(err, registry.ErrBlobUnknown) {
				t.Errorf("GET of what is nowhere: %v", err)
			}
			if _, err := c.Agents[i%2].StatBlob(t.Context(), repo, missing); !errors.Is(err, registry.ErrBlobUnknown) {
				t.Errorf("HEAD of what is nowhere: %v", err)
			}
		})
	}
	wg.Wait()
	if n := asked(missing); n < 1 || n > len(c.OriginURLs) {
		t.Errorf("80 questions about what is nowhere are %d requests", n)
	}
}

// A reader of what is passed on costs the upstream one GET, of the bytes that it wants.
func TestPassedOnWithOneRequest(t *testing.T) {
	b := noise(3<<20, 22)
	up := scripted.New(t, scripted.Options{})
	d := up.PutBlob(nginx, b).Digest
	c, repo := mirroring(t, 2, 1, up, map[string]any{"relay": true})
	pullAll(t, c, repo, b)
	if all, _ := gets(up, d); all != 1 {
		t.Errorf("a reader of the whole is %d requests", all)
	}
	before := len(up.Requests())
	o := originClient(t, c.OriginURLs[0])
	body, err := o.OpenBlob(t.Context(), repo, d, registry.Range{Offset: 2 << 20, Length: 1000})
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	got := make([]byte, 1000)
	if _, err := body.Body.Seek(2<<20, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(body.Body, got); err != nil || !bytes.Equal(got, b[2<<20:2<<20+1000]) {
		t.Errorf("a part is other bytes: %v", err)
	}
	var ranges []string
	for _, q := range up.Requests()[before:] {
		if q.Method == http.MethodGet && q.Reference == d.String() {
			ranges = append(ranges, q.Range)
		}
	}
	if len(ranges) != 1 || ranges[0] != "bytes=2097152-" {
		t.Errorf("a reader of a part is the requests %q", ranges)
	}
}

func TestUpstreamBlobByEveryOriginAtOnce(t *testing.T) {
	b := noise(3<<20, 3)
	up := scripted.New(t, scripted.Options{Rate: 4 << 20})
	up.PutBlob(nginx, b)
	c, repo := mirroring(t, 3, 1, up, nil)
	var wg sync.WaitGroup
	for _, url := range c.OriginURLs {
		for range 3 {
			wg.Go(func() {
				o := originClient(t, url)
				if desc, err := o.StatBlob(t.Context(), repo, digest.FromBytes(b)); err != nil || desc.Size != int64(len(b)) {
					t.Errorf("HEAD: %v %v", desc, err)
				}
				got, err := readBlob(t.Context(), o.Client, repo, digest.FromBytes(b))
				if err != nil || !bytes.Equal(got, b) {
					t.Errorf("%d of %d bytes: %v", len(got), len(b), err)
				}
			})
		}
	}
	wg.Wait()
	if all, _ := gets(up, digest.FromBytes(b)); all != 1 {
		t.Errorf("the blob was asked for %d times", all)
	}
}

func TestUpstreamThatBreaksOffIsResumed(t *testing.T) {
	b := noise(5<<20, 4)
	for _, o := range []scripted.Options{{}, {NoRanges: true}} {
		t.Run(fmt.Sprintf("without ranges=%v", o.NoRanges), func(t *testing.T) {
			up := scripted.New(t, o)
			up.PutBlob(nginx, b)
			up.Fail(scripted.Rule{Kind: "blob", Times: 1, Cut: true, Reset: true, CutAt: 3 << 20})
			up.Fail(scripted.Rule{Kind: "blob", Times: 1, Cut: true, CutAt: 1 << 20})
			c, repo := mirroring(t, 2, 2, up, nil)
			pullAll(t, c, repo, b)
		})
	}
}

func TestUpstreamThatLies(t *testing.T) {
	b := noise(3<<20, 6)
	up := scripted.New(t, scripted.Options{})
	d := up.PutBlob(nginx, b).Digest
	up.Fail(scripted.Rule{Kind: "blob", Times: 1, Flip: true, FlipAt: 2 << 20})
	c, repo := mirroring(t, 2, 2, up, nil)
	got, err := readBlob(t.Context(), c.Agents[0], repo, d)
	if err == nil || len(got) >= len(b) {
		t.Errorf("a wrong blob ended clean after %d bytes: %v", len(got), err)
	}
	// Refused for a moment at this agent, so that a runtime goes on at the upstream.
	var later *registry.RetryError
	if _, err := readBlob(t.Context(), c.Agents[0], repo, d); !errors.Is(err, registry.ErrUnavailable) || !errors.As(err, &later) {
		t.Errorf("right after it broke off: %v", err)
	}
	Eventually(t, 30*time.Second, func() error {
		got, err := readBlob(t.Context(), c.Agents[0], repo, d)
		if err == nil && !bytes.Equal(got, b) {
			err = errors.New("wrong bytes")
		}
		return err
	})
}

func TestUpstreamBlobThatIsPassedOn(t *testing.T) {
	b := noise(3<<20, 7)
	up := scripted.New(t, scripted.Options{})
	d := up.PutBlob(nginx, b).Digest
	c, repo := mirroring(t, 2, 2, up, map[string]any{"relay_above": "1MiB"})
	pullAll(t, c, repo, b)
	for _, url := range c.OriginURLs {
		if _, err := originClient(t, url).LocalStat(t.Context(), repo, d); !errors.Is(err, registry.ErrBlobUnknown) {
			t.Errorf("an origin keeps it: %v", err)
		}
	}
}

func TestUpstreamBlobIsWrittenBackWhereItIsToBe(t *testing.T) {
	b := noise(300_000, 9)
	up := scripted.New(t, scripted.Options{})
	d := up.PutBlob(nginx, b).Digest
	c, repo := mirroring(t, 2, 1, up, map[string]any{"write_back": true})
	pullAll(t, c, repo, b)
	Eventually(t, 30*time.Second, func() error {
		out, err := originClient(t, c.OriginURLs[0]).Durable(t.Context(), repo, []digest.Digest{d})
		if err == nil && len(out.Durable) != 1 {
			err = fmt.Errorf("%+v", out)
		}
		return err
	})
}

func TestOriginThatFetchesDies(t *testing.T) {
	b := noise(8<<20, 8)
	up := scripted.New(t, scripted.Options{Rate: 3 << 20})
	d := up.PutBlob(nginx, b).Digest
	c, repo := mirroring(t, 3, 3, up, nil)
	done := make(chan struct{})
	go func() {
		defer close(done)
		pullAll(t, c, repo, b)
	}()
	Eventually(t, 20*time.Second, func() error {
		for i, url := range c.OriginURLs {
			a, err := originClient(t, url).Arriving(t.Context(), repo, d, cluster.ArrivingRequest{})
			if err != nil {
				return err
			}
			if a.Origin == fmt.Sprintf("origin-%02d", i+1) && len(a.Hashes) > 20*5 {
				c.Origins[i].Stop()
				return nil
			}
		}
		return errors.New("nobody has fetched some of it")
	})
	<-done
	if _, begins := gets(up, d); begins != 2 {
		t.Errorf("the blob was fetched %d times, want once by each of two origins", begins)
	}
}

// pullImage reads a manifest by a reference, and all that it names, as a runtime does. It returns the manifest's
// digest.
func pullImage(ctx context.Context, a *registry.Client, repo string, ref registry.Reference, img scripted.Image) (digest.Digest, error) {
	m, err := a.GetManifest(ctx, repo, ref, registry.GetOptions{})
	if err != nil {
		return "", err
	}
	for _, l := range append(img.Layers, img.Config) {
		b, err := readBlob(ctx, a, repo, l.Digest)
		if err != nil {
			return "", fmt.Errorf("blob %s: %w", l.Digest, err)
		}
		if digest.FromBytes(b) != l.Digest {
			return "", fmt.Errorf("blob %s: wrong bytes", l.Digest)
		}
	}
	return m.Digest, nil
}

func TestImageOfTenLayersByManyAgents(t *testing.T) {
	up := scripted.New(t, scripted.Options{Token: true, Anonymous: true})
	var layers [][]byte
	for i := range 10 {
		layers = append(layers, noise(100_000+i*150_000, byte(20+i)))
	}
	img := up.PutImage(nginx, "latest", layers...)
	c, repo := mirroring(t, 2, 6, up, nil)
	all := func(refs ...registry.Reference) {
		t.Helper()
		var wg sync.WaitGroup
		for i, a := range c.Agents {
			for _, ref := range refs {
				wg.Go(func() {
					if d, err := pullImage(t.Context(), a, repo, ref, img); err != nil || d != img.Manifest.Digest {
						t.Errorf("agent %d, %s: %s %v", i+1, ref, d, err)
					}
				})
			}
		}
		wg.Wait()
	}
	tag, byDigest := registry.Reference{Tag: "latest"}, registry.Reference{Digest: img.Manifest.Digest}
	all(tag)
	for _, l := range append(img.Layers, img.Config) {
		if n, _ := gets(up, l.Digest); n != 1 {
			t.Errorf("blob %s of %d bytes was asked for %d times", l.Digest, l.Size, n)
		}
	}
	manifests := 0
	for _, q := range up.Requests() {
		if q.Kind == "manifest" && q.Status == http.StatusOK {
			manifests++
		}
	}
	if manifests != 1 {
		t.Errorf("the manifest was sent %d times", manifests)
	}
	// What was pulled before is still pulled without the upstream, by tag and digest, also by an agent that has
	// nothing.
	up.Stop()
	c.AgentParts[0].Stop()
	c.Wipe("agent-01")
	c.AgentParts[0].Start()
	all(tag, byDigest)
}

// TestFaultsAtAnUpstream pulls as containerd does with range-parallel fetches, while a tenth of what the upstream
// answers is wrong: what fails at the agent is gone on with at the upstream, and no pull fails.
func TestFaultsAtAnUpstream(t *testing.T) {
	up := scripted.New(t, scripted.Options{})
	c, repo := mirroring(t, 2, 2, up, nil)
	direct := c.client(up.URL)
	faults := []scripted.Rule{
		{Status: 503}, {Status: 429, RetryAfter: 1}, {Refuse: true}, {Cut: true, CutAt: 100_000}, {Cut: true, Reset: true, CutAt: 70_000}, {Short: 10}, {Long: 10},
	}
	pulls := 60
	if testing.Short() {
		pulls = 20
	}
	const chunk = 128 << 10
	var wg sync.WaitGroup
	slots := make(chan struct{}, 4)
	for i := range pulls {
		b := noise(chunk*3+i*1000, byte(100+i))
		d := up.PutBlob(nginx, b).Digest
		if i%3 == 0 {
			rule := faults[i/3%len(faults)]
			rule.Kind, rule.About, rule.Times = "blob", d.String(), 1
			up.Fail(rule)
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			got, err := pullInChunks(t.Context(), []chunkSource{{c.Agents[i%2], repo}, {direct, nginx}}, d, int64(len(b)), chunk)
			if err != nil || !bytes.Equal(got, b) {
				t.Errorf("pull %d: %d of %d bytes: %v", i, len(got), len(b), err)
			}
		})
	}
	wg.Wait()
}

// chunkSource is a host of a runtime's list.
type chunkSource struct {
	*registry.Client
	repo string
}

// pullInChunks reads a blob in parallel chunks, each an open-ended range that is abandoned. A body that ends early is
// opened again at the byte that is missing, through the list of hosts.
func pullInChunks(ctx context.Context, hosts []chunkSource, d digest.Digest, size, chunk int64) ([]byte, error) {
	out := make([]byte, size)
	errs := make([]error, (size+chunk-1)/chunk)
	var wg sync.WaitGroup
	for k := range errs {
		wg.Go(func() {
			at, end := int64(k)*chunk, min(int64(k+1)*chunk, size)
			for tries := 0; at < end; {
				n, err := readChunk(ctx, hosts, d, out[at:end], at)
				if at += n; n > 0 {
					tries = 0
				}
				if err != nil {
					if tries++; tries == 3 {
						errs[k] = err
						return
					}
				}
			}
		})
	}
	wg.Wait()
	return out, errors.Join(errs...)
}

func readChunk(ctx context.Context, hosts []chunkSource, d digest.Digest, into []byte, at int64) (int64, error) {
	var errs []error
	for _, h := range hosts {
		c, err := h.OpenBlob(ctx, h.repo, d, registry.Range{Offset: at, Length: -1})
		if err != nil {
			errs = append(errs, err)
			continue
		}
		defer c.Close()
		if _, err := c.Body.Seek(at, io.SeekStart); err != nil {
			return 0, err
		}
		n, err := io.ReadFull(c.Body, into)
		return int64(n), err
	}
	return 0, errors.Join(errs...)
}
