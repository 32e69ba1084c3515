package runtimes

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

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
	notRun       outcome = ""         // it takes more than a minute
)

// row is what a mirror may answer, and what runtimes make of it.
type row struct {
	what  string
	rules []upstream.Rule // of the mirror, the first one that matches counts
	// Of containerd, of one that fetches chunks in parallel, of who names the registry in the path, and of Docker.
	containerd, parallel, byPath, docker outcome
}

// rows are the reasons why an agent answers as it does. The mirror has every blob, so that what comes "from both" has
// its manifest from the upstream, or a part of a blob.
var rows = []row{
	{"all is well", nil, fromMirror, fromMirror, fromMirror, fromMirror},
	{"400 for the manifest", manifest(400), both, both, fromUpstream, fromUpstream},
	{"403 for the manifest", manifest(403), both, both, fromUpstream, fromUpstream},
	{"404 for the manifest", manifest(404), both, both, fromUpstream, fromUpstream},
	{"500 for the manifest", manifest(500), both, both, fromUpstream, fromUpstream},
	{"502 for the manifest", manifest(502), both, both, fromUpstream, fromUpstream},
	{"503 for the manifest", manifest(503), both, both, fromUpstream, fromUpstream},
	{"401 without a challenge", manifest(401), both, both, fromUpstream, fromUpstream},
	{"401 with a challenge, and no credentials", challenge, fromUpstream, fromUpstream, fromUpstream, fromUpstream},
	{"429 for the manifest", busy("manifest", "head"), both, both, fromUpstream, fromUpstream},
	{"429 for a blob", busy("blob"), both, both, fails, fromUpstream},
	{"404 for a blob", blob(upstream.Rule{Status: 404}), both, both, fails, fromUpstream},
	{"500 for a blob", blob(upstream.Rule{Status: 500}), both, both, fails, fromUpstream},
	{"503 for a blob", blob(upstream.Rule{Status: 503}), both, both, fails, fromUpstream},
	{"HEAD without a digest", []upstream.Rule{{Kind: "head", NoDigest: true}}, fromMirror, fromMirror, fromMirror, fromMirror},
	{"HEAD without a length", []upstream.Rule{{Kind: "head", NoLength: true}}, fromMirror, fromMirror, fromMirror, fromUpstream},
	{"each header after 3 s", []upstream.Rule{{Delay: 3 * time.Second}}, fromMirror, fromMirror, fromMirror, fromMirror},
	{"a body cut by FIN, and then the rest", blob(cutTwice), fromMirror, fromMirror, fails, fromMirror},
	{"a body cut by FIN, and then 503", append(blob(cutTwice), upstream.Rule{Kind: "blob", Status: 503}), both, fails, fails, notRun},
	{"a body cut by RST", blob(upstream.Rule{Times: 2, Cut: true, CutAt: 100_000, Reset: true}), fails, whatever, whatever, fromMirror},
	{"a body that ends clean and short", blob(upstream.Rule{Short: 10}), fails, fails, fails, fromUpstream},
	{"a body of other bytes", blob(upstream.Rule{Flip: true, FlipAt: 100}), fails, fails, fails, fromUpstream},
}

var (
	challenge = []upstream.Rule{{Status: 401, Header: http.Header{"Www-Authenticate": {`Basic realm="mirror"`}}}}
	cutTwice  = upstream.Rule{Times: 2, Cut: true, CutAt: 100_000}
)

func manifest(status int) []upstream.Rule {
	return []upstream.Rule{{Kind: "manifest", Status: status}, {Kind: "head", Status: status}}
}

func blob(r upstream.Rule) []upstream.Rule {
	r.Kind = "blob"
	return []upstream.Rule{r}
}

func busy(kinds ...string) (rules []upstream.Rule) {
	for _, k := range kinds {
		rules = append(rules, upstream.Rule{Kind: k, Status: 429, RetryAfter: 1})
	}
	return rules
}

// want returns what is to become of a pull by a runtime.
func (w row) want(kind string, r runtime) outcome {
	switch {
	case kind == docker.name:
		return w.docker
	case r.byPath:
		return w.byPath
	case strings.HasSuffix(kind, "parallel"):
		return w.parallel
	}
	return w.containerd
}

// TestAnswersOfAMirror: what each runtime does when a mirror answers so. It is why an agent never gives who names the
// registry in the path a manifest without its blobs, why it refuses a blob after a cut to those alone who then go
// on at the upstream, and why it never answers 429, nor ends a body by RST.
func TestAnswersOfAMirror(t *testing.T) {
	up := upstream.New(t, upstream.Options{})
	m := upstream.New(t, upstream.Options{})
	table := newTable("a mirror answers")
	t.Run("of", func(t *testing.T) {
		for _, k := range append(slices.Clone(kinds), docker) {
			t.Run(k.name, func(t *testing.T) {
				t.Parallel()
				r := k.start(t, m.URL, up.Host)
				for i, row := range rows {
					want := row.want(k.name, r)
					if want == notRun {
						continue
					}
					repo := fmt.Sprintf("row%d/%s", i, slug(k.name))
					img := newImage(t, repo, 300_000)
					img.put(up, repo)
					img.put(m, repo, up.Alias+"/"+repo)
					for _, rule := range slices.Backward(row.rules) {
						rule.About = repo
						m.Fail(rule)
					}
					began := time.Now()
					err := r.pull(up.Host + "/" + repo + ":v1")
					got := outcomeOf(m, up, repo, err)
					table.set(row.what, k.name, fmt.Sprintf("%s, %s", got, since(began)))
					if got != want && want != whatever {
						t.Errorf("%s: %s, want %s: %v", row.what, got, want, err)
					}
				}
			})
		}
	})
	t.Log(table)
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
	case err != nil && strings.Contains(err.Error(), hubHost): // Docker's way to the upstream, which is not here
		return fromUpstream
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
			repo := "away/" + slug(k.name)
			newImage(t, repo, 10_000).put(up, repo)
			if err := r.pull(up.Host + "/" + repo + ":v1"); err != nil {
				t.Error(err)
			}
		})
	}
}

// A mirror that hangs and then ends, as an agent does that its watchdog ends, is a mirror that is away from then on.
func TestMirrorThatHangsAndEnds(t *testing.T) {
	up := upstream.New(t, upstream.Options{})
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			asked := make(chan struct{}, 100)
			m := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				asked <- struct{}{}
				<-r.Context().Done()
			}))
			defer m.Close()
			r := k.start(t, m.URL, up.Host)
			repo := "hangs/" + slug(k.name)
			newImage(t, repo, 10_000).put(up, repo)
			done := make(chan error, 1)
			go func() { done <- r.pull(up.Host + "/" + repo + ":v1") }()
			select {
			case <-asked:
			case err := <-done:
				t.Fatalf("the mirror was not asked: %v", err)
			}
			m.Listener.Close()
			m.CloseClientConnections()
			ended := time.Now()
			if err := <-done; err != nil {
				t.Error(err)
			}
			t.Logf("%-22s the image was there %s after the mirror's end", k.name, since(ended))
		})
	}
}

// table is what was seen, to be read by people.
type table struct {
	what  string
	mu    sync.Mutex
	lines []string
	cells map[string]map[string]string // by line and runtime
}

func newTable(what string) *table { return &table{what: what, cells: map[string]map[string]string{}} }

func (b *table) set(line, kind, text string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cells[line] == nil {
		b.lines, b.cells[line] = append(b.lines, line), map[string]string{}
	}
	b.cells[line][kind] = text
}

// String implements fmt.Stringer: it is Markdown.
func (b *table) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var columns []string
	for _, k := range append(slices.Clone(kinds), docker) {
		if slices.ContainsFunc(b.lines, func(l string) bool { return b.cells[l][k.name] != "" }) {
			columns = append(columns, k.name)
		}
	}
	out := fmt.Sprintf("\n| %s | %s |\n|%s\n", b.what, strings.Join(columns, " | "), strings.Repeat("---|", len(columns)+1))
	for _, l := range b.lines {
		out += "| " + l
		for _, c := range columns {
			out += " | " + b.cells[l][c]
		}
		out += " |\n"
	}
	return out
}

// since returns how long ago began was, in tenths of a second.
func since(began time.Time) string { return fmt.Sprintf("%.1f s", time.Since(began).Seconds()) }

func slug(name string) string { return strings.NewReplacer(" ", "-", ".", "-").Replace(name) }
