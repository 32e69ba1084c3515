package origin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/origin/bucket"
	"kraken/origin/upstream"
	"kraken/proto/cluster"
	"kraken/proto/config"
	"kraken/proto/registry"
	script "kraken/test/upstream"
)

// mirroring runs an origin alone that mirrors registries, each as change says.
func mirroring(t *testing.T, change func(*Config), us ...*script.Registry) (*Origin, *cluster.OriginClient) {
	t.Helper()
	return alone(t, func(cfg *Config) {
		cfg.Upstreams.AllowAddresses = []string{"127.0.0.0/8", "::1/128"}
		for _, u := range us {
			cfg.Upstreams.Registries = append(cfg.Upstreams.Registries, upstream.RegistryConfig{
				Registry: u.Host, Access: upstream.Access{CA: u.CAFile, PlainHTTP: u.CAFile == ""}, NegativeTTL: config.Duration(time.Hour),
			})
		}
		change(cfg)
	})
}

// awayBucket is a bucket that can't be asked while it is away.
type awayBucket struct {
	bucket.Bucket
	away atomic.Bool
}

func (b *awayBucket) Stat(ctx context.Context, key string) (bucket.Object, error) {
	if b.away.Load() {
		return bucket.Object{}, bucket.ErrUnavailable
	}
	return b.Bucket.Stat(ctx, key)
}

// What an upstream does not have may be in the bucket, where that is written back: while the bucket can't be asked it
// is 503, however it is asked for, and 404 once the bucket has said no as well.
func TestNotThereNeedsTheBucket(t *testing.T) {
	for _, relay := range []bool{false, true} {
		u := script.New(t, script.Options{})
		u.PutBlob("app", []byte("another"))
		b := &awayBucket{}
		o, c := mirroring(t, func(cfg *Config) {
			cfg.Upstreams.Registries[0].WriteBack, cfg.Upstreams.Registries[0].Relay = true, relay
		}, u)
		o.buckets = o.buckets.Wrap(func(_ string, in bucket.Bucket) bucket.Bucket { b.Bucket = in; return b })
		repo, d := u.Alias+"/app", digest.FromString("nobody has it")
		want := func(want error) {
			t.Helper()
			for what, ask := range map[string]func() error{
				"stat":     func() error { _, err := c.StatBlob(t.Context(), repo, d); return err },
				"open":     func() error { _, err := c.OpenBlob(t.Context(), repo, d, registry.Whole); return err },
				"arriving": func() error { _, err := c.Arriving(t.Context(), repo, d, cluster.ArrivingRequest{}); return err },
				"here": func() error {
					_, err := c.Arriving(t.Context(), repo, d, cluster.ArrivingRequest{Here: true})
					return err
				},
				"metainfo": func() error { _, err := c.Metainfo(t.Context(), repo, d); return err },
			} {
				if err := ask(); !errors.Is(err, want) && !(relay && (what == "arriving" || what == "here") && err == nil) {
					t.Errorf("relay %v: %s: %v, want %v", relay, what, err, want)
				}
			}
		}
		b.away.Store(true)
		for range 2 {
			want(registry.ErrUnavailable)
		}
		b.away.Store(false)
		want(registry.ErrBlobUnknown)
	}
}

// An upstream that ignores ranges and sends chunks, so that no answer of it says how large the blob is, is asked for
// the size: a part is read, and a body that breaks off is gone on with.
func TestChunksWithoutRanges(t *testing.T) {
	for _, relay := range []bool{true, false} {
		u := script.New(t, script.Options{NoRanges: true})
		b := bytes.Repeat([]byte("chunks "), 20_000)
		u.PutBlob("app", b)
		_, c := mirroring(t, func(cfg *Config) { cfg.Upstreams.Registries[0].Relay = relay }, u)
		u.Fail(script.Rule{Kind: "blob", NoLength: true})
		u.Fail(script.Rule{Kind: "blob", NoLength: true, Cut: true, CutAt: 70_000, Times: 1})
		for _, off := range []int64{100, 0} {
			content, err := c.OpenBlob(t.Context(), u.Alias+"/app", digest.FromBytes(b), registry.Range{Offset: off, Length: -1})
			if err != nil {
				t.Fatalf("relay %v: from %d: %v", relay, off, err)
			}
			got, err := io.ReadAll(content.Reader())
			if err = errors.Join(err, content.Close()); err != nil || !bytes.Equal(got, b[len(b)-len(got):]) || int64(len(got)) < int64(len(b))-off {
				t.Errorf("relay %v: from %d: %d bytes, %v", relay, off, len(got), err)
			}
		}
	}
}

// A registry that does not answer takes a share of what may wait for upstreams, and keeps nobody from another one.
func TestSlowRegistryHoldsNobodyUp(t *testing.T) {
	slow, other := script.New(t, script.Options{}), script.New(t, script.Options{})
	b := []byte("a layer")
	other.PutBlob("app", b)
	for name, ask := range map[string]func(context.Context, *cluster.OriginClient, string, digest.Digest) error{
		"stat": func(ctx context.Context, c *cluster.OriginClient, repo string, d digest.Digest) error {
			_, err := c.StatBlob(ctx, repo, d)
			return err
		},
		"open": func(ctx context.Context, c *cluster.OriginClient, repo string, d digest.Digest) error {
			content, err := c.OpenBlob(ctx, repo, d, registry.Whole)
			if err == nil {
				err = content.Close()
			}
			return err
		},
	} {
		o, c := mirroring(t, func(*Config) {}, slow, other)
		o.answers.asking, o.waiting = upstream.NewBudget("questions", 16), upstream.NewBudget("blobs", 16)
		heal := slow.Fail(script.Rule{Hang: true})
		ctx, cancel := context.WithCancel(t.Context())
		errs := make(chan error, 20)
		var wg sync.WaitGroup
		for i := range cap(errs) {
			wg.Go(func() { errs <- ask(ctx, c, slow.Alias+"/app", digest.FromString(fmt.Sprint(i))) })
		}
		for range cap(errs) - 2 {
			if err := <-errs; !errors.Is(err, registry.ErrUnavailable) {
				t.Errorf("%s: one too many: %v", name, err)
			}
		}
		if err := ask(ctx, c, other.Alias+"/app", digest.FromBytes(b)); err != nil {
			t.Errorf("%s: another registry: %v", name, err)
		}
		cancel()
		wg.Wait()
		heal()
	}
}

// HEAD of what is asked by GET alone does nothing: it fetches nothing from an upstream.
func TestHeadFetchesNothing(t *testing.T) {
	u := script.New(t, script.Options{})
	b := []byte("a layer")
	u.PutBlob("app", b)
	o, _ := mirroring(t, func(*Config) {}, u)
	for _, resource := range []string{"arriving", "metainfo", "debt"} {
		resp, err := http.Head(fmt.Sprintf("http://%s/v2/%s/app/_kraken/%s/%s", o.Addr(), u.Alias, resource, digest.FromBytes(b)))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("HEAD %s: %s", resource, resp.Status)
		}
	}
	if n := u.Count("", ""); n != 0 {
		t.Errorf("the upstream was asked %d times", n)
	}
}

// A registry that is passed on and hangs is left alone once its time is over, also when each reader has lost patience
// before: of an image's blobs one costs that time. Of those whose readers have gone one goes on, until then or until
// there is an answer, which nobody keeps.
func TestPassedRegistryThatHangsCostsItsTimeOnce(t *testing.T) {
	for name, gone := range map[string]int{"a reader waits": 0, "readers go away": 3} {
		t.Run(name, func(t *testing.T) {
			u := script.New(t, script.Options{})
			o, c := mirroring(t, func(cfg *Config) {
				cfg.Upstreams.Registries[0].Relay, cfg.Upstreams.Registries[0].Concurrency = true, 2
			}, u)
			o.patience = 1500 * time.Millisecond
			u.Fail(script.Rule{Kind: "blob", Hang: true})
			repo := u.Alias + "/app"
			for i := range gone {
				ctx, leave := context.WithCancel(t.Context())
				left := make(chan error, 1)
				go func() {
					_, err := c.OpenBlob(ctx, repo, digest.FromString("a layer"), registry.Whole)
					left <- err
				}()
				until(t, "nobody asks the registry", func() bool { return u.Count("blob", "") > i })
				leave()
				if err := <-left; err == nil {
					t.Error("what hangs is read")
				}
			}
			if gone == 0 {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				if _, err := c.OpenBlob(ctx, repo, digest.FromString("a layer"), registry.Whole); !errors.Is(err, registry.ErrUnavailable) {
					t.Error(err)
				}
			}
			until(t, "what hangs is not left alone", func() bool { return o.upstreams.Check(t.Context()) != nil })
			asked := u.Count("blob", "")
			var retry *registry.RetryError
			if _, err := c.OpenBlob(t.Context(), repo, digest.FromString("another"), registry.Whole); !errors.As(err, &retry) {
				t.Errorf("the next blob: %v", err)
			}
			if n := u.Count("blob", ""); n != asked {
				t.Errorf("it was asked for the next blob, too: %d requests", n-asked)
			}
		})
	}
}

// A reader of a blob that is passed on who goes away before the answer keeps no slot of the registry after it.
func TestPassedBlobWhoseReaderIsGone(t *testing.T) {
	u := script.New(t, script.Options{})
	b := bytes.Repeat([]byte("a layer"), 100_000)
	u.PutBlob("app", b)
	o, c := mirroring(t, func(cfg *Config) {
		cfg.Upstreams.Registries[0].Relay, cfg.Upstreams.Registries[0].Concurrency = true, 1
	}, u)
	repo, d := u.Alias+"/app", digest.FromBytes(b)
	u.Fail(script.Rule{Kind: "blob", Delay: 300 * time.Millisecond, Times: 1})
	ctx, leave := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() {
		_, err := c.OpenBlob(ctx, repo, d, registry.Whole)
		left <- err
	}()
	until(t, "nobody asks the registry", func() bool { return u.Count("blob", "") == 1 })
	leave()
	<-left
	for range 3 {
		content, err := c.OpenBlob(t.Context(), repo, d, registry.Whole)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(content.Reader())
		if err = errors.Join(err, content.Close()); err != nil || !bytes.Equal(got, b) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	}
	if err := o.upstreams.Check(t.Context()); err != nil {
		t.Error(err)
	}
}
