package arch

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"strings"
	"testing"
)

// What a reader can hold in mind: more is a sign that a function does several things.
const (
	maxLines      = 70
	maxParameters = 6
)

// TestFunctionSize refuses functions of more than 70 lines, from func to the closing brace, or 6 parameters, receivers
// apart. What is in _test.go files may be longer: a scenario reads best in one piece.
func TestFunctionSize(t *testing.T) {
	goFiles(t, func(name string) {
		if strings.HasSuffix(name, "_test.go") {
			return
		}
		files := token.NewFileSet()
		f, err := parser.ParseFile(files, filepath.Join(root, name), nil, 0)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			return
		}
		line := func(p token.Pos) int { return files.Position(p).Line }
		for _, decl := range f.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok || fn.Body == nil {
				continue
			}
			if n := fn.Type.Params.NumFields(); n > maxParameters {
				t.Errorf("%s:%d: %s has %d parameters, at most %d", name, line(fn.Pos()), fn.Name.Name, n, maxParameters)
			}
			n := line(fn.End()) - line(fn.Pos()) + 1
			if n > maxLines {
				t.Errorf("%s:%d: %s has %d lines, at most %d", name, line(fn.Pos()), fn.Name.Name, n, maxLines)
			}
		}
	})
}
