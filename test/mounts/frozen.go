package mounts

import (
	"os/exec"
	"path/filepath"
	"testing"
)

// Disk is a file system that can be made to answer nothing that writes.
type Disk struct {
	Dir    string
	t      *testing.T
	frozen bool
}

// Frozen mounts a file system that Freeze and Thaw act on. It is called by a test that is Alone.
func Frozen(t *testing.T) *Disk {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	d := &Disk{Dir: t.TempDir(), t: t}
	for _, c := range [][]string{{"truncate", "-s", "64M", image}, {"mkfs.ext4", "-q", image}, {"mount", "-o", "loop", image, d.Dir}} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Skipf("%s: %v: %s", c[0], err, out)
		}
	}
	t.Cleanup(func() {
		if d.frozen {
			d.Thaw()
		}
		if out, err := exec.Command("umount", "-l", d.Dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return d
}

// Freeze makes whoever writes wait, as a disk does that has gone.
func (d *Disk) Freeze() { d.fsfreeze("--freeze", true) }

// Thaw ends that.
func (d *Disk) Thaw() { d.fsfreeze("--unfreeze", false) }

func (d *Disk) fsfreeze(how string, frozen bool) {
	d.t.Helper()
	if out, err := exec.Command("fsfreeze", how, d.Dir).CombinedOutput(); err != nil {
		d.t.Fatalf("fsfreeze %s: %v: %s", how, err, out)
	}
	d.frozen = frozen
}
