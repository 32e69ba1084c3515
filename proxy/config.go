package proxy

import (
	"errors"
	"io/fs"
	"os"
	"time"

	"kraken/proto/config"
	"kraken/proto/role"
	"kraken/proto/transport"
	"kraken/proxy/login"
)

// Config is the whole configuration of a proxy; deploy/config/proxy.yaml is the commented sample. Clients push to and
// pull from its server.
type Config struct {
	role.Config `yaml:",inline"`
	// Names are the registry names that mean this cluster, as in the agents. A client may also name an upstream: as
	// ?ns=, or first in the path.
	Names []string `yaml:"names"`
	// BuildIndex is where manifests, tags and memberships are.
	BuildIndex role.Endpoint `yaml:"build_index"`
	// BuildIndexPatience is how long requests wait for a build-index that went away, from that moment on, default 5s.
	// While it is away for longer they fail at once, and uploads are refused before any byte.
	BuildIndexPatience config.Duration `yaml:"build_index_patience" config:"positive"`
	// OriginPatience is how long a read waits for its first byte while no origin gives a blob, because origins restart,
	// hang or are slow, or the bucket is away that alone has it, default 10s, at least StallTimeout. Then it is 503.
	OriginPatience config.Duration `yaml:"origin_patience" config:"positive"`
	// StallTimeout is after how long without progress an origin is left behind in an upload, default 5s.
	StallTimeout config.Duration `yaml:"stall_timeout" config:"positive"`
	// ChunkMinLength is what clients that upload in chunks are asked to send at least in each (OCI-Chunk-Min-Length),
	// default 1MiB. Shorter chunks are taken as well; each costs a round trip to every replica.
	ChunkMinLength config.Size `yaml:"chunk_min_length" config:"positive"`
	// UploadKey signs the ids of uploads, at least 32 bytes, the same at all proxies: a client can't make an id, and
	// any proxy goes on with the uploads of the others. Without it and without UploadKeyFile a key of the process is
	// made, so that no upload outlives it. Of several, one a line, the first signs, and what any of them signed is
	// taken.
	UploadKey config.Secret `yaml:"upload_key"`
	// UploadKeyFile has the key, or the keys, instead; it is made at the first start where it does not exist, and read
	// again when it changes.
	UploadKeyFile string `yaml:"upload_key_file"`
	// Uploads bounds what is under way at once; origins bound what is begun.
	Uploads Uploads `yaml:"uploads"`
	// Access says who may come in, and what they may do. Without it everybody may do everything.
	Access login.Config `yaml:"access"`
}

// Uploads bounds the upload requests that are being served; one more is 429. A source is an IPv4 address, or the first
// 64 bits of an IPv6 one.
type Uploads struct {
	// InFlight is how many there may be, default as many as half of the process's descriptors allow, at most 2048.
	InFlight int `yaml:"in_flight" config:"positive"`
	// InFlightPerSource is how many of one source, default 256.
	InFlightPerSource int `yaml:"in_flight_per_source" config:"positive"`
}

// maxCopies bounds the copies that an upload id may name.
const maxCopies = role.MaxReplicas

// Validate fills in defaults and refuses what can't work.
func (c *Config) Validate() error {
	if c.StallTimeout == 0 {
		c.StallTimeout = config.Duration(5 * time.Second)
	}
	if c.BuildIndexPatience == 0 {
		c.BuildIndexPatience = config.Duration(5 * time.Second)
	}
	if c.OriginPatience == 0 {
		c.OriginPatience = config.Duration(10 * time.Second)
	}
	if c.ChunkMinLength == 0 {
		c.ChunkMinLength = 1 << 20
	}
	var m config.Mistakes
	c.Role = transport.RoleProxy
	c.Config.Validate(&m)
	role.ValidateNames(&m, "names", c.Names)
	c.BuildIndex.Validate(&m, "build_index")
	config.NotNegative(&m, "build_index_patience", c.BuildIndexPatience)
	config.NotNegative(&m, "origin_patience", c.OriginPatience)
	config.NotNegative(&m, "stall_timeout", c.StallTimeout)
	config.NotNegative(&m, "chunk_min_length", c.ChunkMinLength)
	if c.Uploads.InFlight == 0 {
		c.Uploads.InFlight = mostUploads(max(1, c.Replicas))
	}
	if c.Uploads.InFlightPerSource == 0 {
		c.Uploads.InFlightPerSource = 256
	}
	config.NotNegative(&m, "uploads.in_flight", c.Uploads.InFlight)
	config.NotNegative(&m, "uploads.in_flight_per_source", c.Uploads.InFlightPerSource)
	if v := c.UploadKey.Value(); v != "" {
		if _, err := parseKeys("it", []byte(v)); err != nil {
			m.Add("upload_key", "%w", err)
		}
	}
	if c.UploadKeyFile != "" {
		m.Path("upload_key_file", c.UploadKeyFile)
		b, err := os.ReadFile(c.UploadKeyFile)
		if err == nil {
			_, err = parseKeys(c.UploadKeyFile, b)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			m.Add("upload_key_file", "%w", err)
		}
	}
	if c.UploadKey.Value() != "" && c.UploadKeyFile != "" {
		m.Add("upload_key_file", "and upload_key exclude each other: set one")
	}
	c.Access.Validate(&m, "access")
	if c.Access.Certificates && c.Server.TLS.ClientCA == "" {
		m.Add("access.certificates", "needs server.tls.client_ca: without it clients show no certificates")
	}
	return m.Err()
}
