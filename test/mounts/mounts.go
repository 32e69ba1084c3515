// Package mounts gives tests real file systems that are small enough to be filled. They need root, and are mounted
// where only the test sees them.
package mounts

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
)

const own = "KRAKEN_TEST_OWN_MOUNTS"

// Alone runs the rest of a test in a process with mounts of its own, and reports whether this is that process: the
// test returns where it is not. It is skipped where that can't be done.
func Alone(t *testing.T) bool {
	t.Helper()
	if os.Getenv(own) == t.Name() {
		return true
	}
	if os.Geteuid() != 0 || exec.Command("unshare", "--mount", "--propagation", "private", "true").Run() != nil {
		t.Skip("needs root, and a mount namespace of its own")
	}
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", os.Args[0], "-test.run", "^"+t.Name()+"$", "-test.v", "-test.timeout", "3m")
	cmd.Env = append(os.Environ(), own+"="+t.Name())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

// Small mounts a file system of so many bytes and returns its folder. It is called by a test that is Alone.
func Small(t *testing.T, bytes int64) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size="+strconv.FormatInt(bytes, 10), "tmpfs", dir).CombinedOutput(); err != nil {
		t.Skipf("mount: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", "-l", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return dir
}

// Fill takes all that is free below dir but leave bytes, and returns what gives it back.
func Fill(t *testing.T, dir string, leave int64) (empty func()) {
	t.Helper()
	name := filepath.Join(dir, "filler")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	block, size := make([]byte, 1<<20), int64(0)
	for {
		n, err := f.Write(block)
		size += int64(n)
		if err != nil && len(block) == 4096 {
			break
		}
		if err != nil {
			block = block[:4096]
		}
	}
	if err := errors.Join(f.Truncate(max(0, size-leave)), f.Close()); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.Remove(name); err != nil {
			t.Error(err)
		}
	}
}
