package bucket

import (
	"context"
	"fmt"
	"regexp"

	"kraken/proto/config"
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
		b, err := Open(ctx, c, m)
		if err != nil {
			return nil, err
		}
		s.names, s.match, s.buckets = append(s.names, c.Name), append(s.match, c.pattern()), append(s.buckets, b)
	}
	return s, nil
}

// ValidateAll refuses what OpenAll would refuse. It makes nothing and touches no network.
func ValidateAll(cfgs []Config) error {
	var m config.Mistakes
	if len(cfgs) == 0 {
		m.Add("buckets", "at least one is needed")
	}
	first := map[string]int{}
	for i, c := range cfgs {
		at := fmt.Sprintf("buckets[%d]", i)
		m.Join(at, c.Validate())
		if j, twice := first[c.Name]; twice && c.Name != "" {
			m.Add(at+".name", "%q is there twice: buckets[%d] has it, too; each bucket needs its own", c.Name, j)
		} else {
			first[c.Name] = i
		}
	}
	return m.Err()
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

// Wrap returns the set with every bucket decorated by f, as for faults and delays.
func (s *Set) Wrap(f func(name string, b Bucket) Bucket) *Set {
	out := &Set{names: s.names, match: s.match}
	for i, b := range s.buckets {
		out.buckets = append(out.buckets, f(s.names[i], b))
	}
	return out
}
