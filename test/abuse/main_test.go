// Package abuse attacks a cluster of real processes, as somebody would who can reach its listeners: what must not be
// possible is not, nothing dies, and nobody takes the memory, the descriptors or the disk of the others. It is not
// about what a cluster does for those who behave; test/cluster and test/python have that.
//
// A test gets a cluster of its own from start, with whatever configuration it needs, or, when it leaves everything as
// it was, the one that all tests share from shared.
package abuse

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"kraken/deploy/devcluster"
)

// bin is the folder of the binaries that TestMain builds.
var bin string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "kraken-abuse-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	bin = filepath.Join(dir, "bin")
	if err := devcluster.Build(context.Background(), bin); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for i := range common {
		common[i].dir = filepath.Join(dir, fmt.Sprint("shared", i))
	}
	code := m.Run()
	if err := endCommon(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}
