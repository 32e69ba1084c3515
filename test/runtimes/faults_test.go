package runtimes

import (
	"flag"
	"fmt"
	"testing"

	"kraken/test/upstream"
)

var (
	pullsFlag = flag.Int("pulls", 18, "how many images are pulled while their upstream has faults")
	everyFlag = flag.Int("every", 3, "a fault in every so many images")
	sizeFlag  = flag.Int("size", 1_500_000, "bytes of the layer of an image")
)

// Faults of an upstream in some images are no faults of a pull in parallel chunks: the cluster goes on where the body
// was cut, asks again, or leaves the runtime to the upstream. For many: go test ./test/runtimes -run Faults -timeout 2h
// -args -pulls 1000 -every 10.
func TestFaultsOfAnUpstreamFailNoPull(t *testing.T) {
	up := upstream.New(t, upstream.Options{})
	c := mirroring(t, up, nil)
	for _, k := range kinds[3:4] { // who reads in parallel chunks has chosen the agent with the first one
		t.Run(k.name, func(t *testing.T) {
			r := k.start(t, c.Agents[0].Base(), up.Host)
			faults := []upstream.Rule{
				{Kind: "blob", Cut: true, CutAt: 500_000, Times: 1}, {Kind: "blob", Cut: true, CutAt: 700_000, Reset: true, Times: 1},
				{Kind: "blob", Status: 503, Times: 1}, {Kind: "blob", Status: 429, RetryAfter: 1, Times: 1}, {Kind: "manifest", Status: 503, Times: 1}, {Kind: "blob", Refuse: true, Times: 1},
			}
			for i := range *pullsFlag {
				repo := fmt.Sprintf("faults/%s%d", k.name[len(k.name)-5:], i)
				newImage(t, repo, *sizeFlag).put(up, repo)
				what := "nothing"
				if i%*everyFlag == 0 {
					rule := faults[i / *everyFlag % len(faults)]
					rule.About = repo
					up.Fail(rule)
					what = fmt.Sprintf("%+v", rule)
				}
				if err := r.pull(up.Host + "/" + repo + ":v1"); err != nil {
					t.Errorf("image %d, where %s went wrong: %v", i, what, err)
				}
			}
		})
	}
}
