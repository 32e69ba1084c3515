package store

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
)

// generationFile holds the highest generation of names that a build-index was heard to have committed.
const generationFile = "generation"

// RaiseGeneration makes the generation that the store remembers at least n, durably, and returns it. A file that can't
// be read counts as none: the other origins remember, too.
func (s *Store) RaiseGeneration(n int64) (int64, error) {
	defer s.claim(generationFile)()
	if err := s.settle(); err != nil {
		return 0, fmt.Errorf("last generation: %w", err)
	}
	b, err := s.root.ReadFile(generationFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("last generation: %w", err)
	}
	now, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if n <= now {
		return now, nil
	}
	if err := s.writeFile(generationFile, []byte(strconv.FormatInt(n, 10)+"\n")); err != nil {
		return 0, fmt.Errorf("last generation: %w", err)
	}
	return n, nil
}
