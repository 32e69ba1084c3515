package devcluster

import (
	"context"
	"fmt"
	"os/exec"
)

// Build makes the binaries of every role and of testfs in a folder, called from anywhere in the module. It has no flags
// of its own, so that what `go build ./...` and `go vet ./...` left in the cache is used.
func Build(ctx context.Context, into string) error {
	args := []string{"build", "-o", into + "/"}
	for _, of := range []string{"proxy", "origin", "buildindex", "tracker", "agent", "test/testfs"} {
		args = append(args, "kraken/"+of+"/cmd/...")
	}
	if out, err := exec.CommandContext(ctx, "go", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("build the binaries: %w\n%s", err, out)
	}
	return nil
}
