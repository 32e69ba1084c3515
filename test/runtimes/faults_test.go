package runtimes

import (
	"flag"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/test/cluster"
	"kraken/test/upstream"
)

var (
	pullsFlag = flag.Int("pulls", 18, "how many images are pulled while their upstream has faults")
	everyFlag = flag.Int("every", 3, "a fault in every so many images")
	sizeFlag  = flag.Int("size", 1_500_000, "bytes of the layer of an image")
	chunkFlag = flag.Int("chunk", 64<<10, "bytes of the chunks of a layer that are fetched in parallel")
)

// Faults of an upstream in some images are no faults of a pull in parallel chunks: the cluster goes on where the body
// was cut, asks again, or leaves the runtime to the upstream. For many, with chunks as they are used:
//
//	TMPDIR=/dev/shm go test -v ./test/runtimes -run FaultsOfAnUpstreamFailNoPull -timeout 2h \
//		-args -pulls 1000 -every 10 -size 25165824 -chunk 8388608 -state /dev/shm
func TestFaultsOfAnUpstreamFailNoPull(t *testing.T) {
	up, foreign := upstream.New(t, upstream.Options{}), upstream.New(t, upstream.Options{})
	c := cluster.NewSmallMirror(t, 2, 1, map[string]any{
		"registries": []any{map[string]any{"registry": up.Host, "plain_http": true, "tag_ttl": "1s"}}, "allow_addresses": []any{"127.0.0.1/32"},
	}, "1GiB")
	k := inChunks(*chunkFlag) // who reads in parallel chunks has chosen the agent with the first one
	r := k.start(t, c.Agents[0].Base(), up.Host)
	readsInChunks(t, r, foreign)
	cut := int64(*sizeFlag / 3)
	faults := []upstream.Rule{
		{Kind: "blob", Cut: true, CutAt: cut, Times: 1}, {Kind: "blob", Cut: true, CutAt: cut + 200_000, Reset: true, Times: 1},
		{Kind: "blob", Status: 503, Times: 1}, {Kind: "blob", Status: 429, RetryAfter: 1, Times: 1}, {Kind: "manifest", Status: 503, Times: 1}, {Kind: "blob", Refuse: true, Times: 1},
	}
	began, failed, faulty := time.Now(), 0, 0
	var slowest time.Duration
	for i := range *pullsFlag {
		repo := fmt.Sprintf("faults/%d", i)
		img := newImage(t, repo, *sizeFlag)
		img.put(up, repo)
		what, about := "nothing", ""
		if i%*everyFlag == 0 {
			rule := faults[i / *everyFlag % len(faults)]
			if rule.About = digest.FromBytes(img.layer).String(); rule.Kind == "manifest" {
				rule.About = repo + " v1"
			}
			up.Fail(rule)
			what, about = fmt.Sprintf("%+v", rule), rule.About
			faulty++
		}
		at := time.Now()
		image := up.Host + "/" + repo + ":v1"
		if err := r.pull(image); err != nil {
			failed++
			t.Errorf("image %d, where %s went wrong: %v", i, what, err)
		} else if err := r.remove(image); err != nil {
			t.Error(err)
		}
		slowest = max(slowest, time.Since(at))
		if about != "" && up.Count("", about) < 2 {
			t.Errorf("image %d: nothing followed the fault %s: %+v", i, what, up.Requests())
		}
		up.Forget()
		up.Drop(repo)
		if i%100 == 99 {
			t.Logf("%d pulls, %d of them failed, after %s", i+1, failed, time.Since(began).Round(time.Second))
		}
	}
	t.Logf("%d pulls of layers of %d bytes in chunks of %d, %d with a fault: %d failed, in %s, the slowest %s", *pullsFlag, *sizeFlag, *chunkFlag, faulty, failed,
		time.Since(began).Round(time.Second), slowest.Round(time.Millisecond))
}

// readsInChunks fails the test where the runtime does not fetch a layer in chunks.
func readsInChunks(t *testing.T, r runtime, foreign *upstream.Registry) {
	t.Helper()
	newImage(t, "chunks", *sizeFlag).put(foreign, "chunks")
	if err := r.pull(foreign.Host + "/chunks:v1"); err != nil {
		t.Fatal(err)
	}
	begins := 0
	for _, q := range foreign.Requests() {
		if q.Kind == "blob" && strings.HasSuffix(q.Range, fmt.Sprintf("=%d-", *chunkFlag)) {
			begins++
		}
	}
	if begins != 1 {
		t.Errorf("%d chunks begin at byte %d: %+v", begins, *chunkFlag, foreign.Requests())
	}
}
