package origin

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"kraken/origin/bucket"
	"kraken/origin/store"
	"kraken/origin/swarm"
	"kraken/proto/config"
	"kraken/proto/ring"
	"kraken/proto/transport"
)

// Config is the whole configuration of an origin; deploy/config/origin.yaml is the commented sample.
type Config struct {
	// ID is this origin's entry in Origins. It decides what this origin owns: never rename one.
	ID string `yaml:"id"`
	// Server is the registry API for the other roles.
	Server transport.ServerConfig `yaml:"server"`
	// Admin is where health, metrics, profiles and the state of write-back are.
	Admin transport.ServerConfig `yaml:"admin"`
	Log   transport.LogConfig    `yaml:"log"`
	// Client is how this origin speaks to the others.
	Client transport.ClientConfig `yaml:"client"`
	// Origins are all origins of the cluster, this one included.
	Origins []ring.Member `yaml:"origins"`
	// Replicas is the number of origins that hold a blob, default 2; the same in every role.
	Replicas int `yaml:"replicas"`
	// Dir is a folder that only this origin uses.
	Dir string `yaml:"dir"`
	// Capacity bounds the bytes on disk; 0 is unbounded. What is not written back is never evicted.
	Capacity   config.Size `yaml:"capacity"`
	store.Keep `yaml:",inline"`
	// Buckets are the durable storage; the first whose pattern matches a repository is its bucket.
	Buckets []bucket.Config `yaml:"buckets"`
	// Peer is the BitTorrent side.
	Peer Peer `yaml:"peer"`
	// UploadIdle is after how long without a byte an upload session is removed, default 1h.
	UploadIdle config.Duration `yaml:"upload_idle"`
	// Uploads bounds upload sessions, in all and by source.
	Uploads store.Sessions `yaml:"uploads"`
	// Takeover is after how long the second owner writes a blob back itself, when the first has not, default 30s.
	Takeover config.Duration `yaml:"takeover"`
	// WritebackWorkers is how many blobs are written back at once, default 4.
	WritebackWorkers int `yaml:"writeback_workers"`
	// Leasers is how many agents are handed pieces of one blob at once, default 64; others trade meanwhile.
	Leasers int `yaml:"leasers"`
}

// Peer configures the BitTorrent listener.
type Peer struct {
	Listen string `yaml:"listen"`
	// StockPeers lets any BitTorrent client join. For development.
	StockPeers bool `yaml:"stock_peers"`
	// TLS is mutual TLS with the other peers; the same in every origin and agent, and not together with StockPeers.
	TLS transport.PeerTLS `yaml:"tls"`
	// Rates bound the traffic of blobs, e.g. 25Mbit/s; 0 is unlimited. PUT /limits on admin changes them.
	swarm.Rates `yaml:",inline"`
}

// Validate fills in defaults and refuses what can't work.
func (c *Config) Validate() error {
	c.Replicas = orDefault(c.Replicas, 2)
	c.UploadIdle = orDefault(c.UploadIdle, config.Duration(time.Hour))
	c.Takeover = orDefault(c.Takeover, config.Duration(30*time.Second))
	c.WritebackWorkers = orDefault(c.WritebackWorkers, 4)
	c.Server.CongestionControl = orDefault(c.Server.CongestionControl, transport.CongestionAuto)
	c.Leasers = orDefault(c.Leasers, 64)
	var errs []error
	need := func(key, v string) {
		if v == "" {
			errs = append(errs, fmt.Errorf("%s: is needed", key))
		}
	}
	need("id", c.ID)
	need("server.listen", c.Server.Listen)
	need("dir", c.Dir)
	need("peer.listen", c.Peer.Listen)
	if !slices.ContainsFunc(c.Origins, func(m ring.Member) bool { return m.ID == c.ID }) {
		errs = append(errs, fmt.Errorf("origins: this origin, %q, is not among them", c.ID))
	}
	if err := c.Peer.Rates.Validate(); err != nil {
		errs = append(errs, fmt.Errorf("peer: %w", err))
	}
	if c.Peer.StockPeers && c.Peer.TLS != (transport.PeerTLS{}) {
		errs = append(errs, errors.New("peer: stock_peers can't speak tls, set one of both"))
	}
	if err := bucket.ValidateAll(c.Buckets); err != nil {
		errs = append(errs, err)
	}
	if _, _, err := net.SplitHostPort(c.Peer.Listen); c.Peer.Listen != "" && err != nil {
		errs = append(errs, fmt.Errorf("peer.listen: %w", err))
	}
	if err := c.Keep.Validate(); err != nil {
		errs = append(errs, err)
	}
	if err := c.Uploads.Validate(); err != nil {
		errs = append(errs, fmt.Errorf("uploads: %w", err))
	}
	if c.Replicas < 1 || c.Capacity < 0 || c.UploadIdle < 0 || c.Takeover < 0 || c.WritebackWorkers < 1 || c.Leasers < 1 {
		errs = append(errs, errors.New("replicas, capacity, upload_idle, takeover, writeback_workers and leasers must not be negative"))
	}
	return errors.Join(errs...)
}

func orDefault[T comparable](v, d T) T {
	var zero T
	if v == zero {
		return d
	}
	return v
}
