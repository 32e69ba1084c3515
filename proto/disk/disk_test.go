package disk

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
)

func TestSpace(t *testing.T) {
	dir := t.TempDir()
	s, err := Of(dir)
	if err != nil || s.Size <= 0 || s.Free < 0 || s.Free > s.Size {
		t.Fatalf("Of(%s) = %+v, %v", dir, s, err)
	}
	if !strings.HasPrefix(dir, s.Dir) && s.Dir != "/" {
		t.Errorf("%s is said to be on the file system at %s", dir, s.Dir)
	}
	if got := Mount("/proc/self"); got != "/proc" {
		t.Errorf("/proc/self is said to be on the file system at %s", got)
	}
	if _, err := Of(dir + "/none"); err == nil {
		t.Error("a folder that is not there has space")
	}
}

func TestCheck(t *testing.T) {
	for _, c := range []struct {
		s    Space
		full bool
	}{
		{Space{"/data", 0, 100 << 30}, true},
		{Space{"/data", reserve - 1, 100 << 30}, true},
		{Space{"/data", reserve, 100 << 30}, false},
		{Space{"/data", 4, 100}, true},
		{Space{"/data", 5, 100}, false},
	} {
		err := c.s.Check()
		if (err != nil) != c.full {
			t.Errorf("%v: %v", c.s, err)
		}
		if c.full && !strings.Contains(err.Error(), fmt.Sprintf("/data has %d bytes free", c.s.Free)) {
			t.Errorf("%v does not name the file system and its free bytes", err)
		}
	}
}

func TestFull(t *testing.T) {
	for err, full := range map[error]bool{
		&os.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}: true,
		fmt.Errorf("a quota: %w", syscall.EDQUOT):                  true,
		syscall.EIO: false,
		nil:         false,
	} {
		if Full(err) != full {
			t.Errorf("Full(%v) = %t", err, !full)
		}
	}
}
