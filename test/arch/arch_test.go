// Package arch is the import law as a test: which package may import which, and where third-party libraries live.
package arch

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	module = "kraken"
	root   = "../.."
)

// floors is the law: a package may import packages of lower floors only. A package that no line names is refused: give
// it an owner first.
var floors = [][]string{
	{"proto/blob", "proto/ring", "proto/config", "proto/disk"},
	{"proto/transport"},
	{"proto/registry", "proto/announce"},
	{"proto/cluster"},
	{"proto/layout", "proto/role", "proto/access", "proto/audit"},
	{"origin/store", "origin/bucket", "buildindex/names", "origin/swarm/plan", "origin/swarm/rate", "proxy/login"},
	{"origin/swarm", "origin/bucket/buckettest", "origin/upstream"},
	{"agent/mirror", "tracker/dashboard", "buildindex/names/sqlite", "buildindex/names/namestest"},
	{"origin", "tracker", "agent", "buildindex", "proxy"}, // roles never import each other
	{
		"origin/cmd/kraken-origin", "tracker/cmd/kraken-tracker", "agent/cmd/kraken-agent", "agent/cmd/kraken-credential-provider",
		"buildindex/cmd/kraken-build-index", "proxy/cmd/kraken-proxy",
	},
}

// free packages may import anything of the project; nothing of the product imports them.
var free = []string{"deploy", "test"}

// suites are the tests that come with an interface: every implementation runs them, also one on a lower floor, and
// nothing else does.
var suites = []string{"origin/bucket/buckettest", "buildindex/names/namestest"}

// homes says which packages, or which of their files, may import a library. A library that no line names is refused.
var homes = map[string][]string{
	"github.com/anacrolix/torrent":                 {"origin/swarm"},
	"github.com/anacrolix/torrent/bencode":         {"proto/blob", "proto/announce", "origin/swarm"},
	"github.com/anacrolix/torrent/metainfo":        {"proto/blob", "proto/announce", "origin/swarm"},
	"github.com/anacrolix/":                        {"origin/swarm"},
	"github.com/go-chi/chi/v5":                     {"proto/registry", "*/http.go"},
	"github.com/opencontainers/go-digest":          {"*"},
	"github.com/opencontainers/image-spec":         {"proto/registry", "proto/cluster", "buildindex", "buildindex/names", "buildindex/names/namestest", "origin", "origin/upstream", "agent", "proxy"},
	"github.com/prometheus/client_golang":          {"proto/transport", "proto/role", "*/metrics.go", "*/http.go", "origin", "tracker", "agent", "buildindex", "proxy", "origin/swarm", "origin/bucket", "origin/upstream"},
	"github.com/google/go-containerregistry":       {"origin/upstream"},
	"github.com/docker/cli":                        {"origin/upstream"},
	"golang.org/x/net/http/httpproxy":              {"origin/upstream"},
	"golang.org/x/net/publicsuffix":                {"origin/upstream"},
	"gocloud.dev/":                                 {"origin/bucket"},
	"github.com/aws/":                              {"origin/bucket"},
	"modernc.org/sqlite":                           {"buildindex/names/sqlite", "buildindex/names/namestest"},
	"github.com/pressly/goose/v3":                  {"buildindex/names/sqlite", "buildindex/names/namestest"},
	"github.com/goccy/go-yaml":                     {"proto/config", "agent/mirror"},
	"github.com/cyphar/filepath-securejoin":        {"agent/mirror"},
	"github.com/pelletier/go-toml/v2":              {"agent/mirror"},
	"github.com/dustin/go-humanize":                {"proto/config", "tracker/dashboard"},
	"github.com/spf13/cobra":                       {"proto/role/command.go"},
	"golang.org/x/crypto/x509roots/fallback":       {"proto/role/command.go"},
	"golang.org/x/sync":                            {"*"},
	"golang.org/x/sys/unix":                        {"origin/store", "proto/transport"},
	"golang.org/x/time/rate":                       {"proto/transport", "proto/role", "agent", "origin", "origin/upstream", "origin/store", "origin/swarm", "origin/swarm/rate"},
	"github.com/google/uuid":                       {"*"},
	"github.com/hashicorp/golang-lru/v2":           {"tracker", "agent", "buildindex", "origin", "origin/upstream", "proxy/login"},
	"github.com/hashicorp/golang-lru/v2/expirable": {}, // nobody can end its goroutine
	"github.com/jellydator/ttlcache/v3":            {"agent", "origin"},
	"github.com/go-jose/go-jose/v4":                {"proto/access"},
	"github.com/coreos/go-oidc/v3":                 {"proto/access"},
	"golang.org/x/crypto/bcrypt":                   {"proxy/login"},
	"os/signal":                                    {"proto/role/command.go"},
	"github.com/cenkalti/backoff/v5":               {"proto/transport"},
	"github.com/RoaringBitmap/roaring":             {"origin/swarm"},
}

// pure packages decide and calculate: they meet neither sockets nor files, so their tests need neither.
var pure = []string{"origin/swarm/plan"}

// outside are the packages of the standard library that meet sockets, files and processes.
var outside = []string{"net", "os", "syscall"}

// grabBags are names that say nothing about what is inside.
var grabBags = []string{"util", "utils", "common", "helper", "helpers", "lib", "pkg", "misc", "types"}

// topLevel is all that may stand beside the packages' folders.
var topLevel = []string{"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE", "Makefile", "go.mod", "go.sum", "requirements-tests.txt", "docs"}

func floorOf(pkg string) int {
	for i, f := range floors {
		if slices.Contains(f, pkg) {
			return i
		}
	}
	return -1
}

func isFree(pkg string) bool {
	return slices.ContainsFunc(free, func(p string) bool { return pkg == p || strings.HasPrefix(pkg, p+"/") })
}

// homeOf finds the most specific line of homes for an import.
func homeOf(imp string) (string, bool) {
	best := ""
	for lib := range homes {
		if (imp == lib || strings.HasPrefix(imp, strings.TrimSuffix(lib, "/")+"/")) && len(lib) > len(best) {
			best = lib
		}
	}
	return best, best != ""
}

func allowed(lib, pkg, file string) bool {
	for _, h := range homes[lib] {
		if h == "*" || h == pkg || h == file {
			return true
		}
		if ok, _ := path.Match(strings.TrimPrefix(h, "*/"), path.Base(file)); ok && strings.HasSuffix(h, ".go") {
			return true
		}
		if h == "*/cmd/*" && strings.Contains("/"+pkg+"/", "/cmd/") {
			return true
		}
	}
	return false
}

func TestImportLaw(t *testing.T) {
	projectFiles(t, ".go", 50, []string{"testdata", "test/tools"}, func(name string) { check(t, name) })
}

func TestFolderNames(t *testing.T) {
	projectFiles(t, "", 100, []string{"testdata"}, func(name string) {
		for dir := range strings.SplitSeq(path.Dir(name), "/") {
			if slices.Contains(grabBags, dir) {
				t.Errorf("%s: the name %s says nothing about what is inside", name, dir)
			}
		}
	})
}

func check(t *testing.T, file string) {
	pkg := path.Dir(file)
	isTest := strings.HasSuffix(file, "_test.go")
	mine := floorOf(pkg)
	if mine < 0 && !isFree(pkg) {
		t.Errorf("%s: package %s is not in the law: give it a floor", file, pkg)
		return
	}
	f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, filepath.FromSlash(file)), nil, parser.ImportsOnly)
	if err != nil {
		t.Error(err)
		return
	}
	for _, spec := range f.Imports {
		imp, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			t.Error(err)
			continue
		}
		if own, ok := strings.CutPrefix(imp, module+"/"); ok {
			theirs := floorOf(own)
			switch {
			case isFree(pkg), own == pkg:
			case isTest && (strings.HasPrefix(own, "test/") || slices.Contains(suites, own)):
			case slices.Contains(suites, own):
				t.Errorf("%s imports %s, which is for tests", file, own)
			case theirs < 0 || isFree(own):
				t.Errorf("%s imports %s, which is not of the product", file, own)
			case theirs >= mine:
				t.Errorf("%s imports %s, which is on the same floor or above", file, own)
			}
			continue
		}
		if top, _, _ := strings.Cut(imp, "/"); slices.Contains(pure, pkg) && slices.Contains(outside, top) {
			t.Errorf("%s imports %s, and %s only decides", file, imp, pkg)
		}
		lib, known := homeOf(imp)
		switch {
		case isFree(pkg), isTest:
		case known && !allowed(lib, pkg, file):
			t.Errorf("%s imports %s, whose home is %v", file, imp, homes[lib])
		case !known && strings.Contains(strings.Split(imp, "/")[0], "."):
			t.Errorf("%s imports %s, which has no home", file, imp)
		}
	}
}

func TestTopLevel(t *testing.T) {
	dirs := []string{"origin", "tracker", "agent", "buildindex", "proxy", "proto", "deploy", "test", "bin", "venv"}
	es, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range es {
		name := e.Name()
		if strings.HasPrefix(name, ".") || slices.Contains(topLevel, name) || (e.IsDir() && slices.Contains(dirs, name)) {
			continue
		}
		t.Errorf("%s does not belong at the top level", name)
	}
}

// TestLawRefuses keeps the test itself honest.
func TestLawRefuses(t *testing.T) {
	if floorOf("agent") <= floorOf("origin/swarm") || floorOf("origin") != floorOf("agent") || floorOf("nowhere") >= 0 {
		t.Error("floors are wrong")
	}
	if lib, ok := homeOf("github.com/anacrolix/torrent/metainfo"); !ok || !allowed(lib, "proto/blob", "proto/blob/x.go") || allowed(lib, "agent", "agent/x.go") {
		t.Errorf("home of metainfo is %q", lib)
	}
	if lib, _ := homeOf("github.com/anacrolix/torrent/storage"); allowed(lib, "proto/blob", "proto/blob/x.go") {
		t.Errorf("home of storage is %q", lib)
	}
	if lib, _ := homeOf("github.com/go-chi/chi/v5/middleware"); !allowed(lib, "agent", "agent/http.go") || allowed(lib, "agent", "agent/pull.go") {
		t.Errorf("home of chi is %q", lib)
	}
	for _, pkg := range pure {
		if lib, _ := homeOf("github.com/anacrolix/torrent"); floorOf(pkg) < 0 || allowed(lib, pkg, pkg+"/x.go") {
			t.Errorf("%s may import the BitTorrent library", pkg)
		}
	}
	if _, ok := homeOf("github.com/somebody/else"); ok {
		t.Error("an unknown library has a home")
	}
}

// Databases that a library leaves in a working directory, keys and profiles are nobody's source.
func TestNothingLeftBehind(t *testing.T) {
	left := []string{".db", ".db-wal", ".db-shm", ".sqlite", ".pem", ".key", ".prof", ".out", ".test"}
	err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		top, _, _ := strings.Cut(filepath.ToSlash(rel), "/")
		if e.IsDir() && (e.Name() == "testdata" || strings.HasPrefix(e.Name(), ".state-") || top == "bin" || top == "venv" || top != "." && strings.HasPrefix(top, ".")) {
			return filepath.SkipDir
		}
		if !e.IsDir() && slices.Contains(left, path.Ext(e.Name())) {
			t.Errorf("%s does not belong here: it was left by a run", rel)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
