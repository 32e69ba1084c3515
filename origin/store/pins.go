package store

import (
	"errors"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
)

// ErrConfigured is the attempt to change what the configuration says.
var ErrConfigured = errors.New("set by the configuration")

// pin is who pinned a blob.
type pin int

const (
	pinnedByRequest pin = iota
	pinnedByConfig
)

func pinFile(d digest.Digest) string { return fileOf("pins", d) }

// scanPins finds what was pinned.
func (s *Store) scanPins() error {
	s.pins = map[digest.Digest]pin{}
	if err := s.eachOf("pins", func(d digest.Digest) { s.pins[d] = pinnedByRequest }); err != nil {
		return err
	}
	for _, d := range s.cfg.Pinned {
		s.pins[d] = pinnedByConfig
	}
	return nil
}

// Pin keeps a blob from being evicted until Unpin, across restarts. It need not be there yet.
func (s *Store) Pin(d digest.Digest) error {
	if _, err := blob.ParseDigest(d.String()); err != nil {
		return fmt.Errorf("pin: %w", err)
	}
	defer s.claim(pinFile(d))()
	s.mu.Lock()
	_, there := s.pins[d]
	if !there {
		s.pins[d] = pinnedByRequest // before it is on the disk: it must not be evicted meanwhile
	}
	s.mu.Unlock()
	if there {
		return nil
	}
	if err := s.writeFile(pinFile(d), nil); err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.pins, d)
		return fmt.Errorf("pin %s: %w", d, err)
	}
	return nil
}

// Unpin ends Pin. A blob that was not pinned is fine; ErrConfigured when the configuration pins it.
func (s *Store) Unpin(d digest.Digest) error {
	if _, err := blob.ParseDigest(d.String()); err != nil {
		return fmt.Errorf("unpin: %w", err)
	}
	defer s.claim(pinFile(d))()
	s.mu.Lock()
	configured := s.pins[d] == pinnedByConfig
	s.mu.Unlock()
	if configured {
		return fmt.Errorf("unpin %s: %w", d, ErrConfigured)
	}
	if err := s.remove(pinFile(d)); err != nil {
		return fmt.Errorf("unpin %s: %w", d, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.pins, d)
	s.retryAt = 0
	return nil
}

// Pins lists what is pinned.
func (s *Store) Pins() []digest.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]digest.Digest, 0, len(s.pins))
	for d := range s.pins {
		out = append(out, d)
	}
	slices.Sort(out)
	return out
}
