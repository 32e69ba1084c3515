package buildindex

import (
	"errors"
	"fmt"
	"regexp"

	"kraken/origin/bucket"
	"kraken/proto/ring"
	"kraken/proto/transport"
)

// Config is the whole configuration of a build-index; deploy/config/build-index.yaml is the commented sample.
type Config struct {
	// Server is the registry API for the other roles.
	Server transport.ServerConfig `yaml:"server"`
	// Admin is where health, metrics, profiles and the state of the outbox are.
	Admin transport.ServerConfig `yaml:"admin"`
	Log   transport.LogConfig    `yaml:"log"`
	// Client is how this role speaks to origins.
	Client transport.ClientConfig `yaml:"client"`
	// Origins are all origins of the cluster.
	Origins []ring.Member `yaml:"origins"`
	// Replicas is the number of origins that hold a blob, and of those that hold a name which the bucket lacks, default 2.
	Replicas int `yaml:"replicas"`
	// Database is the path of the SQLite file. Its folder is made when it is missing.
	Database string `yaml:"database"`
	// Buckets are the durable storage, as in the origins.
	Buckets []bucket.Config `yaml:"buckets"`
	// Repositories are policies; the first whose pattern matches a repository applies to it.
	Repositories []Policy `yaml:"repositories"`
}

// Policy is what holds for some repositories.
type Policy struct {
	// Match is a regular expression for whole repository names.
	Match string `yaml:"match"`
	// References is strict (default: what a manifest refers to must be in the repository) or lax (anything goes).
	References string `yaml:"references"`

	// ImmutableTags is a regular expression for whole tags that, once pushed, can neither be moved nor deleted; default none, ".*" for all.
	ImmutableTags string `yaml:"immutable_tags"`

	re, immutable *regexp.Regexp
}

// Validate fills in defaults and refuses what can't work.
func (c *Config) Validate() error {
	if c.Replicas == 0 {
		c.Replicas = 2
	}
	var errs []error
	if c.Server.Listen == "" {
		errs = append(errs, errors.New("server.listen: is needed"))
	}
	if c.Database == "" {
		errs = append(errs, errors.New("database: is needed"))
	}
	if len(c.Origins) == 0 {
		errs = append(errs, errors.New("origins: at least one is needed"))
	}
	if err := bucket.ValidateAll(c.Buckets); err != nil {
		errs = append(errs, err)
	}
	if c.Replicas < 1 {
		errs = append(errs, errors.New("replicas: must be at least 1"))
	}
	for i := range c.Repositories {
		p := &c.Repositories[i]
		var err error
		if p.re, err = regexp.Compile(`^(?:` + p.Match + `)$`); err != nil || p.Match == "" {
			errs = append(errs, fmt.Errorf("repositories[%d].match: %q is no regular expression", i, p.Match))
		}
		if p.ImmutableTags != "" {
			if p.immutable, err = regexp.Compile(`^(?:` + p.ImmutableTags + `)$`); err != nil {
				errs = append(errs, fmt.Errorf("repositories[%d].immutable_tags: %q is no regular expression", i, p.ImmutableTags))
			}
		}
		if p.References != "" && p.References != "strict" && p.References != "lax" {
			errs = append(errs, fmt.Errorf("repositories[%d].references: %q: want strict or lax", i, p.References))
		}
	}
	return errors.Join(errs...)
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

// lax says that manifests of a repository may refer to what is not there.
func (c *Config) lax(repo string) bool { return c.policy(repo).References == "lax" }

// immutable says that a tag must neither move nor go.
func (c *Config) immutable(repo, tag string) bool {
	p := c.policy(repo)
	return p.immutable != nil && p.immutable.MatchString(tag)
}
