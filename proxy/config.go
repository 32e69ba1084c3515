package proxy

import (
	"errors"
	"fmt"
	"time"

	"kraken/proto/config"
	"kraken/proto/ring"
	"kraken/proto/transport"
)

// Config is the whole configuration of a proxy; deploy/config/proxy.yaml is the commented sample.
type Config struct {
	// Server is where clients push and pull.
	Server transport.ServerConfig `yaml:"server"`
	// Admin is where health, metrics and profiles are; keep it away from clients.
	Admin transport.ServerConfig `yaml:"admin"`
	Log   transport.LogConfig    `yaml:"log"`
	// Client is how this proxy speaks to origins and build-index.
	Client transport.ClientConfig `yaml:"client"`
	// Origins are all origins of the cluster. Ids decide who owns what: never rename one.
	Origins []ring.Member `yaml:"origins"`
	// Replicas is the number of origins that hold a blob, default 2; the same in every role.
	Replicas int `yaml:"replicas"`
	// BuildIndex is where manifests, tags and memberships are.
	BuildIndex Endpoint `yaml:"build_index"`
	// StallTimeout is after how long without progress an origin is left behind in an upload, default 5s.
	StallTimeout config.Duration `yaml:"stall_timeout"`
	// ChunkMinLength is what clients that upload in chunks are asked to send at least in each (OCI-Chunk-Min-Length), default 1MiB. Shorter
	// chunks are taken as well; each costs a round trip to every replica.
	ChunkMinLength config.Size `yaml:"chunk_min_length"`
	// UploadKey signs the ids of uploads, at least 32 bytes, the same at all proxies: a client can't make an id, and any proxy goes on with the
	// uploads of the others. Without it and without UploadKeyFile a key of the process is made, so that no upload outlives it.
	UploadKey config.Secret `yaml:"upload_key"`
	// UploadKeyFile has the key instead; it is made at the first start where it does not exist.
	UploadKeyFile string `yaml:"upload_key_file"`
	// Uploads bounds what is under way at once; origins bound what is begun.
	Uploads Uploads `yaml:"uploads"`
}

// Uploads bounds the upload requests that are being served; one more is 429. A source is an IPv4 address, or the first 64 bits of an IPv6 one.
type Uploads struct {
	// InFlight is how many there may be, default as many as half of the process's descriptors allow, at most 2048.
	InFlight int `yaml:"in_flight"`
	// InFlightPerSource is how many of one source, default 256.
	InFlightPerSource int `yaml:"in_flight_per_source"`
}

// Endpoint is a role that is reached by URL.
type Endpoint struct {
	URL string `yaml:"url"`
}

// maxCopies bounds the copies that an upload id may name.
const maxCopies = 5

// Validate fills in defaults and refuses what can't work.
func (c *Config) Validate() error {
	if c.Replicas == 0 {
		c.Replicas = 2
	}
	if c.StallTimeout == 0 {
		c.StallTimeout = config.Duration(5 * time.Second)
	}
	if c.ChunkMinLength == 0 {
		c.ChunkMinLength = 1 << 20
	}
	if c.Uploads.InFlight == 0 {
		c.Uploads.InFlight = mostUploads(c.Replicas)
	}
	if c.Uploads.InFlightPerSource == 0 {
		c.Uploads.InFlightPerSource = 256
	}
	var errs []error
	if c.Uploads.InFlight < 1 || c.Uploads.InFlightPerSource < 1 {
		errs = append(errs, errors.New("uploads.in_flight and uploads.in_flight_per_source must not be negative"))
	}
	if len(c.Origins) == 0 {
		errs = append(errs, errors.New("origins: at least one is needed"))
	}
	seen := map[string]bool{}
	for i, o := range c.Origins {
		if o.ID == "" || o.URL == "" {
			errs = append(errs, fmt.Errorf("origins[%d]: id and url are needed", i))
		}
		if seen[o.ID] {
			errs = append(errs, fmt.Errorf("origins[%d]: id %q is there twice", i, o.ID))
		}
		seen[o.ID] = true
	}
	if c.Replicas < 1 || c.Replicas > maxCopies {
		errs = append(errs, fmt.Errorf("replicas: %d is not in 1..%d", c.Replicas, maxCopies))
	}
	if c.BuildIndex.URL == "" {
		errs = append(errs, errors.New("build_index.url: is needed"))
	}
	if n := len(c.UploadKey.Value()); n > 0 && n < minKey {
		errs = append(errs, fmt.Errorf("upload_key: has %d bytes, at least %d are needed", n, minKey))
	}
	if c.UploadKey.Value() != "" && c.UploadKeyFile != "" {
		errs = append(errs, errors.New("upload_key and upload_key_file exclude each other"))
	}
	if c.StallTimeout < 0 || c.ChunkMinLength < 0 {
		errs = append(errs, errors.New("stall_timeout and chunk_min_length must not be negative"))
	}
	return errors.Join(errs...)
}
