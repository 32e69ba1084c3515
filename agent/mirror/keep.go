package mirror

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"syscall"
)

// keptPath is where a node's files are kept as they were before the first Install.
const keptPath = "/var/lib/kraken/mirror.json"

// kept is what was on a node before.
type kept struct {
	Files map[string]keptFile `json:"files"`
}

// keptFile is one file.
type keptFile struct {
	Runtime  string      `json:"runtime"`
	Original *string     `json:"original"` // nil: there was none
	Mode     fs.FileMode `json:"mode"`
	Wrote    string      `json:"wrote"`   // SHA-256 of what was installed last
	Ours     []string    `json:"ours"`    // URLs of the agent that were installed, from the first to the last
	Folders  []string    `json:"folders"` // that were made for it, the outermost first
}

func (k *kept) paths() []string { return slices.Sorted(maps.Keys(k.Files)) }

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// readKept returns what is kept, which may be nothing.
func (n node) readKept() (*kept, error) {
	k := &kept{Files: map[string]keptFile{}}
	b, err := n.read(keptPath)
	if err != nil || b == nil {
		return k, err
	}
	if err := json.Unmarshal(b, k); err != nil || k.Files == nil {
		return nil, fmt.Errorf("%s does not say what was there before an installation: %w", keptPath, err)
	}
	return k, nil
}

func (n node) writeKept(k *kept) error {
	if len(k.Files) == 0 {
		if err := os.Remove(n.at(keptPath)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	b, err := json.MarshalIndent(k, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(n.at(path.Dir(keptPath)), 0o755); err != nil {
		return err
	}
	return replace(n.at(keptPath), b, 0o600)
}

// errTheirs is a file that was changed since it was installed, of which what was installed can't be told from the rest.
var errTheirs = errors.New("was changed since it was installed, and is left as it is")

// without returns a file without what was installed: what it was before, or, where somebody has changed it since, what
// it is now without what is ours. Nil: there would be none.
func (k keptFile) without(path string, is []byte) ([]byte, error) {
	if digestOf(is) == k.Wrote {
		if k.Original == nil {
			return nil, nil
		}
		return []byte(*k.Original), nil
	}
	takeOut := takeOuts[k.Runtime]
	if takeOut == nil {
		return nil, fmt.Errorf("%w: runtime %q is unknown", errTheirs, k.Runtime)
	}
	rest, err := takeOut(path, is, k.Ours)
	if err == nil && k.Original == nil && len(bytes.TrimSpace(rest)) == 0 {
		rest = nil
	}
	return rest, err
}

// takeOuts return, for each runtime, what a file says that was changed since it was installed, without what names one
// of ours, URLs of the agent; errTheirs where that can't be told.
var takeOuts = map[string]func(path string, text []byte, ours []string) ([]byte, error){
	"containerd": containerdWithout, "containers": onlyOurs, "docker": dockerWithout,
	"k3s": rancherWithout, "rke2": rancherWithout, "buildkit": buildkitWithout,
}

// write makes a file what it is to be, and keeps what it is without what is ours, durably, first.
func (n node) write(k *kept, runtime string, f file, ours ...string) error {
	before, known := k.Files[f.path]
	is, err := node{n.root, k}.read(f.path)
	if err != nil {
		return fmt.Errorf("%s: %w", f.path, err)
	}
	before.Original = nil
	if is != nil {
		text := string(is)
		before.Original = &text
	}
	if !known {
		before.Mode = 0o644
		if info, err := os.Stat(n.at(f.path)); err == nil {
			before.Mode = info.Mode().Perm()
		}
		for dir := path.Dir(f.path); dir != "/" && !n.has(dir); dir = path.Dir(dir) {
			before.Folders = append([]string{dir}, before.Folders...)
		}
	}
	for _, at := range ours {
		if at != "" && !slices.Contains(before.Ours, at) {
			before.Ours = append(before.Ours, at)
		}
	}
	before.Runtime, before.Wrote = runtime, digestOf(f.text)
	k.Files[f.path] = before
	if err := n.writeKept(k); err != nil {
		return fmt.Errorf("keep what %s was: %w", f.path, err)
	}
	if err := os.MkdirAll(n.at(path.Dir(f.path)), 0o755); err != nil {
		return err
	}
	return replace(n.at(f.path), f.text, before.Mode)
}

// restore makes a file what it is to be without what was installed; nil: none.
func (n node) restore(path string, k keptFile, text []byte) error {
	if text != nil {
		return replace(n.at(path), text, k.Mode)
	}
	if err := os.Remove(n.at(path)); err != nil {
		return err
	}
	for _, dir := range slices.Backward(k.Folders) {
		if os.Remove(n.at(dir)) != nil {
			break // somebody else's files are in it
		}
	}
	return nil
}

// replace writes a file in one step, durably. One that was there keeps its owner and group.
func replace(name string, b []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(path.Dir(name), ".kraken-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if info, serr := os.Stat(name); serr == nil {
		if was, ok := info.Sys().(*syscall.Stat_t); ok && (int(was.Uid) != os.Geteuid() || int(was.Gid) != os.Getegid()) {
			err = errors.Join(err, f.Chown(int(was.Uid), int(was.Gid)))
		}
	}
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return syncFolder(path.Dir(name))
}

// syncFolder makes the names in a folder durable.
func syncFolder(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
