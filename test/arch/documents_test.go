package arch

import (
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// goFile is a name of a Go file in a document, with whatever folders stand before it.
var goFile = regexp.MustCompile(`[A-Za-z0-9_.*-]+(?:/[A-Za-z0-9_.*-]+)*\.go\b`)

// packageName is how documents name a package: in code quotes, a path whose first folder is one of the project's.
var packageName = regexp.MustCompile("`((?:proto|origin|tracker|agent|buildindex|proxy|deploy|test)(?:/[a-zA-Z0-9_.-]+)+)/?`")

var word = regexp.MustCompile(`[A-Za-z0-9_]+`)

// exported is how documents name a symbol of a package, in code quotes.
var exported = regexp.MustCompile("`([a-z]+)\\.([A-Z][A-Za-z0-9]*)[^`\n]*`")

// TestDocumentsNameWhatExists refuses documents that name a Go file, a folder or a symbol which is not there: what was
// moved is named anew. A name without its folders may be of any package; folders named out are made by what runs.
// MEASUREMENTS.md and CHANGELOG.md tell of times past.
func TestDocumentsNameWhatExists(t *testing.T) {
	var names []string
	words := map[string]map[string]bool{} // by the name of a package: what is in its files
	goFiles(t, func(name string) {
		names = append(names, "/"+name)
		text, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		pkg := path.Base(path.Dir(name))
		if words[pkg] == nil {
			words[pkg] = map[string]bool{}
		}
		for _, w := range word.FindAllString(string(text), -1) {
			words[pkg][w] = true
		}
	})
	documents(t, func(name, text string) {
		if base := path.Base(name); base == "MEASUREMENTS.md" || base == "CHANGELOG.md" {
			return
		}
		for _, file := range goFile.FindAllString(text, -1) {
			if strings.Contains(file, "*") {
				continue
			}
			clean := strings.TrimLeft(path.Clean(file), "./")
			if !slices.ContainsFunc(names, func(n string) bool { return strings.HasSuffix(n, "/"+clean) }) {
				t.Errorf("%s names %s, which is not there", name, file)
			}
		}
		for _, m := range packageName.FindAllStringSubmatch(text, -1) {
			if !strings.Contains(m[1]+"/", "/out/") && !namedFolder(m[1]) {
				t.Errorf("%s names %s, which is not there", name, m[1])
			}
		}
		for _, m := range exported.FindAllStringSubmatch(text, -1) {
			if of := words[m[1]]; of != nil && !of[m[2]] {
				t.Errorf("%s names %s.%s, which is not there", name, m[1], m[2])
			}
		}
	})
}

// namedFolder reports whether a path from the root is there. The last part may be a symbol of a package, as in
// `proto/cluster.Change`.
func namedFolder(name string) bool {
	dir, last := path.Split(name)
	before, _, _ := strings.Cut(last, ".")
	for _, p := range []string{name, dir + before} {
		if _, err := os.Stat(filepath.Join(root, filepath.FromSlash(p))); err == nil {
			return true
		}
	}
	return false
}

// documents calls f with the path from the root and the text of each of the project's documents.
func documents(t *testing.T, f func(name, text string)) {
	t.Helper()
	projectFiles(t, ".md", 5, nil, func(name string) {
		b, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Error(err)
			return
		}
		f(name, string(b))
	})
}

// The operators' table of versions names the database's newest migration.
func TestDatabaseVersion(t *testing.T) {
	migrations, err := filepath.Glob(filepath.Join(root, "buildindex/names/sqlite/migrations/*.sql"))
	if err != nil || len(migrations) == 0 {
		t.Fatalf("%d migrations were found: %v", len(migrations), err)
	}
	slices.Sort(migrations)
	number, _, _ := strings.Cut(path.Base(migrations[len(migrations)-1]), "_")
	b, err := os.ReadFile(filepath.Join(root, "deploy/README.md"))
	if err != nil {
		t.Fatal(err)
	}
	if row := "by migration | " + strings.TrimLeft(number, "0") + " |"; !strings.Contains(string(b), row) {
		t.Errorf("deploy/README.md has no %q in its table of versions", row)
	}
}
