package bucket

import (
	"context"
	"errors"
	"fmt"
	"regexp"
)

// Set is the configured buckets.
type Set struct {
	names   []string
	match   []*regexp.Regexp
	buckets []Bucket
}

// OpenAll opens every configured bucket; m may be nil.
func OpenAll(ctx context.Context, cfgs []Config, m *Metrics) (*Set, error) {
	if err := ValidateAll(cfgs); err != nil {
		return nil, err
	}
	s := &Set{}
	for _, c := range cfgs {
		re, err := c.pattern()
		if err != nil {
			return nil, fmt.Errorf("bucket %s: repositories: %w", c.Name, err)
		}
		b, err := Open(ctx, c, m)
		if err != nil {
			return nil, err
		}
		s.names, s.match, s.buckets = append(s.names, c.Name), append(s.match, re), append(s.buckets, b)
	}
	return s, nil
}

// ValidateAll refuses what OpenAll would refuse. It touches neither network nor disk.
func ValidateAll(cfgs []Config) error {
	if len(cfgs) == 0 {
		return errors.New("buckets: at least one is needed")
	}
	seen := map[string]bool{}
	var errs []error
	for _, c := range cfgs {
		if err := c.Validate(); err != nil {
			errs = append(errs, err)
		}
		if seen[c.Name] && c.Name != "" {
			errs = append(errs, fmt.Errorf("buckets: %s is there twice", c.Name))
		}
		seen[c.Name] = true
	}
	return errors.Join(errs...)
}

// For is the bucket of a repository, ok is false when none matches.
func (s *Set) For(repo string) (name string, b Bucket, ok bool) {
	for i, re := range s.match {
		if re.MatchString(repo) {
			return s.names[i], s.buckets[i], true
		}
	}
	return "", nil, false
}

// Get is a bucket by name.
func (s *Set) Get(name string) (Bucket, bool) {
	for i, n := range s.names {
		if n == name {
			return s.buckets[i], true
		}
	}
	return nil, false
}

// All calls fn for every bucket, until it fails.
func (s *Set) All(fn func(name string, b Bucket) error) error {
	for i, n := range s.names {
		if err := fn(n, s.buckets[i]); err != nil {
			return err
		}
	}
	return nil
}
