package abuse

import (
	"io/fs"
	"path/filepath"
	"testing"
)

// TestModes: what roles write to disk is for their own user alone.
func TestModes(t *testing.T) {
	c := start(t, options{agents: 1})
	hc := c.client(t)
	push(t, hc, c.Proxy.URL, "modes/app", "v1", random(3<<20), random(1000))
	pull(t, hc, c.Agents[0].URL, "modes/app", "v1")
	do(t, hc, "POST", c.Proxy.URL, "/v2/modes/app/blobs/uploads/", nil)
	files := 0
	for _, p := range c.all() {
		err := filepath.WalkDir(p.state(), func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				return nil // gone meanwhile
			}
			info, err := e.Info()
			if err != nil {
				return nil
			}
			files++
			if more := info.Mode().Perm() & 0o077; more != 0 && path != p.state() {
				rel, err := filepath.Rel(p.state(), path)
				if err != nil {
					return err
				}
				t.Errorf("%s: %s has mode %s", p.Name, rel, info.Mode())
			}
			return nil
		})
		if err != nil {
			t.Errorf("%s: %v", p.Name, err)
		}
	}
	if files < 50 {
		t.Errorf("%d files: the walk went elsewhere", files)
	}
}
