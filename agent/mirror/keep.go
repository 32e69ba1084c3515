package mirror

import (
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

// write makes a file what it is to be, and keeps what it was, durably, first.
func (n node) write(k *kept, runtime string, f file) error {
	before, known := k.Files[f.path]
	is, err := n.read(f.path)
	if err != nil {
		return err
	}
	if !known {
		before.Mode = 0o644
		if info, err := os.Stat(n.at(f.path)); err == nil {
			before.Mode = info.Mode().Perm()
		}
		if is != nil {
			text := string(is)
			before.Original = &text
		}
		for dir := path.Dir(f.path); !n.has(dir); dir = path.Dir(dir) {
			before.Folders = append([]string{dir}, before.Folders...)
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

// restore makes a file what it was.
func (n node) restore(path string, k keptFile) error {
	if k.Original != nil {
		return replace(n.at(path), []byte(*k.Original), k.Mode)
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

// replace writes a file in one step.
func replace(name string, b []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(path.Dir(name), ".kraken-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
