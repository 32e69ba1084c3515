package store

import (
	"io/fs"
	"path"
	"strings"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
)

// fileOf is the file of a digest in one of the folders that have a file for each: debts, paid and pins.
func fileOf(folder string, d digest.Digest) string {
	return path.Join(folder, d.Algorithm().String()+"-"+d.Encoded())
}

// eachOf calls f with each digest that has a file in such a folder. What a crash left half written has another name.
func (s *Store) eachOf(folder string, f func(digest.Digest)) error {
	es, err := fs.ReadDir(s.root.FS(), folder)
	if err != nil {
		return err
	}
	for _, e := range es {
		if d, err := blob.ParseDigest(strings.Replace(e.Name(), "-", ":", 1)); err == nil {
			f(d)
		}
	}
	return nil
}
