package runtimes

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"kraken/test/upstream"
)

// outcome is what becomes of a pull.
type outcome string

const (
	fromMirror   outcome = "from the mirror"
	fromUpstream outcome = "from the upstream"
	both         outcome = "from both"
	fails        outcome = "fails"
	whatever     outcome = "whatever" // by how much was read before
)

// rows are what a mirror may answer, and what runtimes make of it: the reasons why an agent answers as it does. The
// mirror has every blob, so that what comes "from both" has its manifest from the upstream, or a part of a blob.
var rows = []struct {
	what  string
	rules []upstream.Rule // of the mirror, the first one that matches counts
	// Of containerd, of containerd that fetches chunks in parallel, and of who names the registry in the path.
	containerd, parallel, byPath outcome
}{
	{"all is well", nil, fromMirror, fromMirror, fromMirror},
	{"404 for the manifest", manifest(404), both, both, fromUpstream},
	{"403 for the manifest", manifest(403), both, both, fromUpstream},
	{"503 for the manifest", manifest(503), both, both, fromUpstream},
	{"401 without a challenge", manifest(401), both, both, fromUpstream},
	{"503 for a blob", []upstream.Rule{{Kind: "blob", Status: 503}}, both, both, fails},
	{"404 for a blob", []upstream.Rule{{Kind: "blob", Status: 404}}, both, both, fails},
	{"a body cut by FIN, and then the rest", []upstream.Rule{{Kind: "blob", Times: 2, Cut: true, CutAt: 100_000}}, fromMirror, fromMirror, fails},
	{"a body cut by FIN, and then 503", []upstream.Rule{{Kind: "blob", Times: 2, Cut: true, CutAt: 100_000}, {Kind: "blob", Status: 503}}, both, fails, fails},
	{"a body cut by RST", []upstream.Rule{{Kind: "blob", Times: 2, Cut: true, CutAt: 100_000, Reset: true}}, fails, whatever, whatever},
}

func manifest(status int) []upstream.Rule {
	return []upstream.Rule{{Kind: "manifest", Status: status}, {Kind: "head", Status: status}}
}

// TestAnswersOfAMirror: what each runtime does when a mirror answers so. It is why an agent never gives who names the
// registry in the path a manifest without its blobs, and why it refuses a blob after a cut to those alone who then go
// on at the upstream.
func TestAnswersOfAMirror(t *testing.T) {
	up := upstream.New(t, upstream.Options{})
	m := upstream.New(t, upstream.Options{})
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			r := k.start(t, m.URL, up.Host)
			for i, row := range rows {
				repo := fmt.Sprintf("row%d/%s", i, strings.ReplaceAll(k.name, " ", "-"))
				img := newImage(t, repo, 300_000)
				img.put(up, repo)
				img.put(m, repo, up.Alias+"/"+repo)
				for _, rule := range slices.Backward(row.rules) {
					rule.About = repo
					m.Fail(rule)
				}
				err := r.pull(up.Host + "/" + repo + ":v1")
				want := row.containerd
				switch {
				case r.byPath:
					want = row.byPath
				case strings.HasSuffix(k.name, "parallel"):
					want = row.parallel
				}
				if got := outcomeOf(m, up, repo, err); got != want && want != whatever {
					t.Errorf("%s: %s, want %s: %v", row.what, got, want, err)
				}
			}
		})
	}
}

// outcomeOf tells from who was asked for a manifest and for blobs how a pull went.
func outcomeOf(m, up *upstream.Registry, repo string, err error) outcome {
	served := func(r *upstream.Registry) (n int) {
		for _, q := range r.Requests() {
			if strings.Contains(q.Repository, repo) && (q.Kind == "manifest" || q.Kind == "blob") && q.Status/100 == 2 {
				n++
			}
		}
		return n
	}
	switch mirror, upstream := served(m), served(up); {
	case err != nil:
		return fails
	case mirror > 0 && upstream > 0:
		return both
	case mirror > 0:
		return fromMirror
	}
	return fromUpstream
}

// A mirror that is not there costs nothing: the runtime goes on at once.
func TestMirrorThatIsAway(t *testing.T) {
	up := upstream.New(t, upstream.Options{})
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			r := k.start(t, "http://127.0.0.1:9", up.Host)
			repo := "away/" + strings.ReplaceAll(k.name, " ", "-")
			newImage(t, repo, 10_000).put(up, repo)
			if err := r.pull(up.Host + "/" + repo + ":v1"); err != nil {
				t.Error(err)
			}
		})
	}
}
