package arch

import (
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// projectFiles calls f with each of the files that have an extension, or with all if ext is empty, by the path from the
// root. It fails when there are fewer than atLeast. It enters no folders in skip, no hidden ones, nor what make builds.
func projectFiles(t *testing.T, ext string, atLeast int, skip []string, f func(name string)) {
	t.Helper()
	n := 0
	err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		if e.IsDir() {
			if rel != "." && (strings.HasPrefix(e.Name(), ".") || rel == "bin" || rel == "venv" || slices.Contains(skip, rel) || slices.Contains(skip, e.Name())) {
				return fs.SkipDir
			}
			return nil
		}
		if ext == "" || path.Ext(rel) == ext {
			n++
			f(rel)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if n < atLeast {
		t.Errorf("only %d files *%s were found: the test looks at the wrong place", n, ext)
	}
}
