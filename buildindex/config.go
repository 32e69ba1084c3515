package buildindex

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"regexp"

	"kraken/buildindex/names"
	"kraken/buildindex/names/sqlite"
	"kraken/origin/bucket"
	"kraken/origin/upstream"
	"kraken/proto/cluster"
	"kraken/proto/config"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// Config is the whole configuration of a build-index; deploy/config/build-index.yaml is the commented sample. Its
// server is the registry API for the other roles; its admin also shows the state of the outbox.
type Config struct {
	role.Config `yaml:",inline"`
	// Database is the path of the SQLite file. Its folder is made when it is missing.
	Database string `yaml:"database"`
	// Buckets are the durable storage, as in the origins.
	Buckets []bucket.Config `yaml:"buckets"`
	// RecordKeyFile is a PEM file with the Ed25519 key (PKCS #8) that signs name records, made at the first start where
	// there is none, with its public half beside it (.pub). Default none: records are not signed, and whoever reaches
	// an origin can write one.
	RecordKeyFile string `yaml:"record_key_file"`
	// RecordKeys are further public keys whose records are believed, the same as in the origins: 32 bytes in base64, or
	// file: and the path of a PEM file.
	RecordKeys []string `yaml:"record_keys"`
	// Upstreams are the registries outside the cluster that it mirrors, the same in the origins.
	Upstreams upstream.Config `yaml:"upstreams"`
	// OpenNames opens Database, nil is SQLite. Machine says on which machine and disk that is, empty asks the kernel.
	// Set by tests.
	OpenNames func(ctx context.Context, path string) (names.Store, error) `yaml:"-"`
	Machine   string                                                      `yaml:"-"`
	// Repositories are policies; the first whose pattern matches a repository applies to it.
	Repositories []Policy `yaml:"repositories"`
}

// Policy is what holds for some repositories.
type Policy struct {
	// Match is a regular expression for whole repository names.
	Match string `yaml:"match"`
	// References is strict (default: what a manifest refers to must be in the repository) or lax (anything goes).
	References string `yaml:"references"`

	// ImmutableTags is a regular expression for whole tags that, once pushed, can neither be moved nor deleted; default
	// none, ".*" for all.
	ImmutableTags string `yaml:"immutable_tags"`

	re, immutable *regexp.Regexp
}

// Validate fills in defaults and refuses what can't work.
func (c *Config) Validate() error {
	var m config.Mistakes
	c.Role = transport.RoleBuildIndex
	if c.OpenNames == nil {
		c.OpenNames = func(ctx context.Context, path string) (names.Store, error) { return sqlite.Open(ctx, path) }
	}
	c.Config.Validate(&m)
	m.File("database", c.Database)
	m.Join("", bucket.ValidateAll(c.Buckets))
	m.Join("upstreams", c.Upstreams.Validate())
	if len(c.RecordKeys) > 0 && c.RecordKeyFile == "" {
		m.Add("record_key_file", "is needed with record_keys, because records must be signed to be believed")
	}
	cluster.ValidateNameKeys(&m, "record_keys", c.RecordKeys)
	if c.RecordKeyFile != "" {
		m.Path("record_key_file", c.RecordKeyFile)
		if _, err := cluster.ReadNameSigner(c.RecordKeyFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
			m.Add("record_key_file", "%w", err)
		}
	}
	for i := range c.Repositories {
		key, p := fmt.Sprintf("repositories[%d]", i), &c.Repositories[i]
		m.Need(key+".match", p.Match)
		p.re = m.Pattern(key+".match", p.Match)
		if p.ImmutableTags != "" {
			p.immutable = m.Pattern(key+".immutable_tags", p.ImmutableTags)
		}
		if p.References != "" && p.References != "strict" && p.References != "lax" {
			m.Add(key+".references", "%q: want strict or lax", p.References)
		}
	}
	return m.Err()
}

// policy is the first whose pattern matches.
func (c *Config) policy(repo string) (p Policy) {
	for _, p := range c.Repositories {
		if p.re.MatchString(repo) {
			return p
		}
	}
	return p
}

// lax reports whether manifests of a repository may refer to what is not there.
func (c *Config) lax(repo string) bool { return c.policy(repo).References == "lax" }

// immutable reports whether a tag must neither move nor go.
func (c *Config) immutable(repo, tag string) bool {
	p := c.policy(repo)
	return p.immutable != nil && p.immutable.MatchString(tag)
}
