package runtimes

import (
	"flag"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"kraken/test/cluster"
	"kraken/test/upstream"
)

const (
	fromAgent   outcome = "by the agent"
	restDirect  outcome = "the rest directly" // of a blob, or of an image
	direct      outcome = "directly"
	secondTime  outcome = "at the second try"
	slowPull            = 20 * time.Second
	hungTooLong         = 75 * time.Second
)

// fault is what goes wrong with the way of the cluster to a registry, whose way to the runtime is in order.
type fault struct {
	what  string
	rules []upstream.Rule
	// within bounds a pull, default slowPull.
	within time.Duration
	// spoils says that bytes were passed on that can't be taken back: who has them fails, as at a registry that sends
	// them itself, and gets the image at the second try. containerd goes on with what it has, and may fail again.
	spoils bool
}

var rowsFlag = flag.String("rows", "", "a regular expression of the faults of an upstream to try")

// steps are what a pull asks a registry for, in order. Its blobs are at another host.
var steps = []struct {
	name  string
	kinds []string
}{{"token", []string{"token"}}, {"manifest", []string{"head", "manifest"}}, {"blob", []string{"stat", "blob"}}, {"storage", []string{"storage"}}}

// faults are a row for each fault at each step.
func faults() (rows []fault) {
	each := func(what string, rule upstream.Rule, spoils bool, within time.Duration, at ...string) {
		for _, s := range steps {
			if len(at) > 0 && !slices.Contains(at, s.name) {
				continue
			}
			f := fault{what: what + ", " + s.name, within: within, spoils: spoils}
			for _, k := range s.kinds {
				r := rule
				r.Kind = k
				f.rules = append(f.rules, r)
			}
			rows = append(rows, f)
		}
	}
	rows = append(rows, fault{what: "nothing"})
	each("429", upstream.Rule{Status: 429, RetryAfter: 1}, false, 0)
	each("429 once", upstream.Rule{Status: 429, RetryAfter: 1, Times: 1}, false, 0)
	each("401", upstream.Rule{Status: 401}, false, 0)
	each("403", upstream.Rule{Status: 403}, false, 0, "manifest", "blob", "storage")
	each("404", upstream.Rule{Status: 404}, false, 0, "manifest", "blob", "storage")
	each("500", upstream.Rule{Status: 500}, false, 0)
	each("503", upstream.Rule{Status: 503}, false, 0)
	each("503 once", upstream.Rule{Status: 503, Times: 1}, false, 0)
	each("headers after 3 s", upstream.Rule{Delay: 3 * time.Second}, false, 40*time.Second)
	each("hangs", upstream.Rule{Hang: true}, false, hungTooLong) // names are waited for 10 s, a blob at each origin 25 s
	each("hangs in the body", upstream.Rule{HangBody: true, CutAt: 500_000}, true, hungTooLong, "storage")
	each("refused connections", upstream.Rule{Refuse: true}, false, 0)
	each("cut by FIN once", upstream.Rule{Cut: true, CutAt: 500_000, Times: 1}, false, 0, "storage")
	each("cut by FIN", upstream.Rule{Cut: true, CutAt: 500_000}, false, 0, "storage")
	each("cut by RST once", upstream.Rule{Cut: true, Reset: true, CutAt: 500_000, Times: 1}, false, 0, "storage")
	each("cut by RST", upstream.Rule{Cut: true, Reset: true, CutAt: 500_000}, false, 0, "storage")
	each("other bytes", upstream.Rule{Flip: true, FlipAt: 100}, true, 0, "manifest", "storage")
	each("too short", upstream.Rule{Short: 10}, true, 0, "manifest", "storage")
	each("too long", upstream.Rule{Long: 10}, true, 0, "manifest", "storage")
	each("no digest", upstream.Rule{NoDigest: true}, false, 0, "manifest")
	each("another digest", upstream.Rule{Digest: "sha256:" + strings.Repeat("0", 64)}, false, 0, "manifest")
	each("no length", upstream.Rule{NoLength: true}, false, 0, "manifest", "storage")
	each("redirected to where nobody may be sent", upstream.Rule{Location: "http://169.254.169.254/latest"}, false, 0, "manifest", "blob", "storage")
	return rows
}

// site is a registry as one runtime and the cluster reach it for one fault, each on a way of its own, so that no pause
// that the cluster makes after one fault is seen at the next.
type site struct{ direct, ofCluster *upstream.Registry }

// TestFaultsOfAnUpstream: whatever goes wrong with the cluster's way to a registry, a runtime gets the image in bounded
// time, as it would without the cluster: by the agent, or because the agent sends it on to the registry in time. It is
// never told 429.
func TestFaultsOfAnUpstream(t *testing.T) {
	rows := slices.DeleteFunc(faults(), func(f fault) bool { return !regexp.MustCompile(*rowsFlag).MatchString(f.what) })
	sites := map[string][]site{}
	var registries []any
	for _, k := range kinds {
		for range rows {
			s := site{upstream.New(t, upstream.Options{}), upstream.New(t, upstream.Options{Token: true, Anonymous: true, Storage: true})}
			sites[k.name] = append(sites[k.name], s)
			registries = append(registries, map[string]any{"registry": s.direct.Host, "endpoints": []any{map[string]any{"url": s.ofCluster.URL, "plain_http": true}}})
		}
	}
	c := cluster.NewMirror(t, 2, 1, map[string]any{"registries": registries, "allow_addresses": []any{"127.0.0.1/32"}})
	table := newTable("at the upstream")
	t.Run("of", func(t *testing.T) {
		for _, k := range kinds {
			t.Run(k.name, func(t *testing.T) {
				t.Parallel()
				var hosts []string
				for _, s := range sites[k.name] {
					hosts = append(hosts, s.direct.Host)
				}
				r := k.start(t, c.Agents[0].Base(), hosts...)
				var slow sync.WaitGroup
				slots := make(chan struct{}, 3)
				for i, f := range rows {
					if f.within > slowPull { // they only wait, each in a runtime of its own, whose downloads at once are few
						own := k.start(t, c.Agents[0].Base(), sites[k.name][i].direct.Host)
						slow.Go(func() { table.set(f.what, k.name, f.pulledBy(t, k.name, own, sites[k.name][i])) })
						continue
					}
					slots <- struct{}{}
					slow.Go(func() {
						defer func() { <-slots }()
						table.set(f.what, k.name, f.pulledBy(t, k.name, r, sites[k.name][i]))
					})
				}
				slow.Wait()
			})
		}
	})
	t.Log(table)
	if text := metrics(t, c.Admin("agent-01")); strings.Contains(text, `status="429"`) {
		t.Errorf("a runtime was told 429:\n%s", text)
	}
}

// pulledBy has a runtime pull an image of the site while the fault lasts, and returns how that went.
func (f fault) pulledBy(t *testing.T, kind string, r runtime, s site) string {
	repo := "fault/" + slug(kind) + "/" + slug(strings.ToLower(strings.ReplaceAll(f.what, ",", "")))
	img := newImage(t, repo, 1_500_000)
	img.put(s.direct, repo)
	img.put(s.ofCluster, repo)
	for _, rule := range f.rules {
		s.ofCluster.Fail(rule)
	}
	image := s.direct.Host + "/" + repo + ":v1"
	began := time.Now()
	err := r.pull(image)
	took := time.Since(began)
	got := howPulled(s.direct, err)
	if err != nil && (r.byPath || f.spoils) {
		if err = r.pull(image); err == nil {
			got = "at try 2"
		}
	}
	within := f.within
	if within == 0 {
		within = slowPull
	}
	if err != nil && !(f.spoils && strings.Contains(err.Error(), "unexpected commit digest")) {
		t.Errorf("%s: %v", f.what, err)
	}
	if took > within {
		t.Errorf("%s: it took %s", f.what, took.Round(time.Millisecond))
	}
	return fmt.Sprintf("%s, %.1f s", got, took.Seconds())
}

// howPulled tells from what the registry itself was asked for by the runtime.
func howPulled(registry *upstream.Registry, err error) outcome {
	served := map[string]bool{}
	for _, q := range registry.Requests() {
		served[q.Kind] = served[q.Kind] || q.Status/100 == 2
	}
	switch {
	case err != nil:
		return fails
	case served["manifest"]:
		return direct
	case served["blob"]:
		return restDirect
	}
	return fromAgent
}

// metrics returns those of an admin listener.
func metrics(t *testing.T, addr string) string {
	t.Helper()
	resp, err := http.Get("http://" + addr + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for l := range strings.Lines(string(b)) {
		if strings.HasPrefix(l, "kraken_http_requests_total") {
			lines = append(lines, l)
		}
	}
	if len(lines) == 0 {
		t.Fatalf("no requests are counted: %s", b)
	}
	return strings.Join(lines, "")
}
