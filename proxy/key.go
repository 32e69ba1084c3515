package proxy

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"kraken/proto/access"
)

// minKey is the length in bytes that a key for upload ids has at least, maxKeys how many there may be.
const (
	minKey  = 32
	maxKeys = 10
)

// uploadKeys returns the keys of upload ids: the configured ones, those in the configured file, which is made at the
// first start and read again when it changes, or one of this process alone. usable returns why the file is not.
func uploadKeys(cfg Config, log *slog.Logger) (keys func() [][]byte, usable func() error, err error) {
	always := func(keys [][]byte) func() [][]byte { return func() [][]byte { return keys } }
	fine := func() error { return nil }
	switch {
	case cfg.UploadKey.Value() != "":
		keys, err := parseKeys("upload_key", []byte(cfg.UploadKey.Value()))
		return always(keys), fine, err
	case cfg.UploadKeyFile != "":
		made, err := makeKey(cfg.UploadKeyFile)
		if err != nil {
			return nil, nil, fmt.Errorf("upload_key_file: %w", err)
		}
		if made {
			log.Info("a key for upload ids was made: with several proxies give all of them the same one, else an upload that began at one can't go on at another",
				"file", cfg.UploadKeyFile)
		}
		f, err := access.OpenFile(cfg.UploadKeyFile, log, parseKeys)
		if err != nil {
			return nil, nil, fmt.Errorf("upload_key_file: %w", err)
		}
		return f.Get, f.Err, nil
	}
	log.Warn("no upload_key is configured: an upload that began here can't go on at another proxy, nor after a restart of this one")
	return always([][]byte{newKey()}), fine, nil
}

// parseKeys reads keys, one a line, the one that signs first. It is called for what name stands for.
func parseKeys(name string, b []byte) (keys [][]byte, err error) {
	for line := range strings.Lines(string(b)) {
		key := strings.TrimSpace(line)
		if key == "" {
			continue
		}
		if len(key) < minKey {
			return nil, fmt.Errorf("%s has a line of %d bytes, a key has at least %d", name, len(key), minKey)
		}
		keys = append(keys, []byte(key))
	}
	if len(keys) == 0 || len(keys) > maxKeys {
		return nil, fmt.Errorf("%s has %d keys, want 1 to %d", name, len(keys), maxKeys)
	}
	return keys, nil
}

// newKey is 256 random bits as text.
func newKey() []byte {
	b := make([]byte, minKey)
	rand.Read(b) // never fails
	return []byte(hex.EncodeToString(b))
}

// makeKey makes a file with a key, readable for this user alone, when there is no such file. Of several processes that
// make it at once one succeeds.
func makeKey(name string) (made bool, err error) {
	if _, err := os.Stat(name); !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return false, err
	}
	tmp, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".*.new") // 0600
	if err != nil {
		return false, err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(append(newKey(), '\n'))
	if err == nil {
		err = tmp.Sync()
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		return false, err
	}
	err = os.Link(tmp.Name(), name)
	if errors.Is(err, fs.ErrExist) {
		return false, nil
	}
	return err == nil, err
}
