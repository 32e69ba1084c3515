package proxy

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
)

// minKey is the length in bytes that a key for upload ids has at least, maxKey what is read of its file.
const (
	minKey = 32
	maxKey = 64 << 10
)

// uploadKey returns the key of upload ids: the configured one, the one in the configured file, which is made at the
// first start, or one of this process alone.
func uploadKey(cfg Config, log *slog.Logger) ([]byte, error) {
	switch {
	case cfg.UploadKey.Value() != "":
		return []byte(cfg.UploadKey.Value()), nil
	case cfg.UploadKeyFile != "":
		key, made, err := keyFile(cfg.UploadKeyFile)
		if err != nil {
			return nil, fmt.Errorf("upload_key_file: %w", err)
		}
		if made {
			log.Info("a key for upload ids was made: with several proxies give all of them the same one, else an upload that began at one can't go on at another",
				"file", cfg.UploadKeyFile)
		}
		return key, nil
	}
	log.Warn("no upload_key is configured: an upload that began here can't go on at another proxy, nor after a restart of this one")
	return newKey(), nil
}

// newKey is 256 random bits as text.
func newKey() []byte {
	b := make([]byte, minKey)
	rand.Read(b) // never fails
	return []byte(hex.EncodeToString(b))
}

// keyFile reads a key, and makes it, readable for this user alone, when there is no such file. Of several processes
// that make it at once one succeeds and the others read its key.
func keyFile(name string) (key []byte, made bool, err error) {
	if key, err = readKey(name); !errors.Is(err, fs.ErrNotExist) {
		return key, false, err
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return nil, false, err
	}
	tmp, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".*.new") // 0600
	if err != nil {
		return nil, false, err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(append(newKey(), '\n'))
	if err == nil {
		err = tmp.Sync()
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		return nil, false, err
	}
	err = os.Link(tmp.Name(), name)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, false, err
	}
	made = err == nil
	key, err = readKey(name)
	return key, made, err
}

func readKey(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxKey))
	if err != nil {
		return nil, err
	}
	key := strings.TrimSpace(string(b))
	if len(key) < minKey {
		return nil, fmt.Errorf("%s has %d bytes, a key has at least %d", name, len(key), minKey)
	}
	return []byte(key), nil
}
