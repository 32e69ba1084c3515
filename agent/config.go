package agent

import (
	"errors"
	"fmt"
	"time"

	"kraken/origin/store"
	"kraken/origin/swarm"
	"kraken/proto/config"
	"kraken/proto/ring"
	"kraken/proto/transport"
)

// Config is the whole configuration of an agent; deploy/config/agent.yaml is the commented sample.
type Config struct {
	// Server is the registry for the runtimes of this node; keep it on localhost.
	Server transport.ServerConfig `yaml:"server"`
	// Admin is where health, metrics and profiles are. Empty listen: no admin listener.
	Admin transport.ServerConfig `yaml:"admin"`
	Log   transport.LogConfig    `yaml:"log"`
	// Client is how this agent speaks to the other roles.
	Client transport.ClientConfig `yaml:"client"`
	// Node is the name that people see, default the host's name.
	Node string `yaml:"node"`
	// Names are the registry names that mean this cluster. A runtime's mirror request names its registry as ?ns=; for any other
	// name the answer is 404, so that the runtime goes on to that registry. Empty: every name means this cluster.
	Names []string `yaml:"names"`
	// Origins are all origins of the cluster. Ids decide who owns what: never rename one.
	Origins []ring.Member `yaml:"origins"`
	// Replicas is the number of origins that hold a blob, default 2; the same in every role.
	Replicas   int      `yaml:"replicas"`
	BuildIndex Endpoint `yaml:"build_index"`
	Tracker    Endpoint `yaml:"tracker"`
	// Peer is the BitTorrent side.
	Peer Peer `yaml:"peer"`
	// Cache is where blobs are kept.
	Cache Cache `yaml:"cache"`
	// SmallBlob is the size up to which a blob is fetched straight from an origin over HTTP and not announced, default 1MiB. Blobs that
	// were cached as small ones have no metainfo and stay out of the swarm when it is lowered.
	SmallBlob config.Size `yaml:"small_blob"`
	// ManifestTTL is how long a manifest that build-index confirmed is served by digest without asking again, default 1m. A
	// deleted digest is gone at this agent after this time. Tags are confirmed on every pull.
	ManifestTTL config.Duration `yaml:"manifest_ttl"`
	// BuildIndexWait is how long a manifest's answer is waited for, and up to a tenth more, while build-index can be connected to,
	// default 10s. Only what is unreachable, or silent for so long, is answered for with something older.
	BuildIndexWait config.Duration `yaml:"build_index_wait"`
	// StaleTags is how old a tag's last confirmed digest may be to be served while build-index is unreachable, default 24h.
	StaleTags config.Duration `yaml:"stale_tags"`
}

// Endpoint is a role that is reached by URL.
type Endpoint struct {
	URL string `yaml:"url"`
}

// Peer configures the BitTorrent listener.
type Peer struct {
	Listen string `yaml:"listen"`
	// Advertise is the IP address, or ip:port, that other agents dial; default the listener's own.
	Advertise string `yaml:"advertise"`
	// StockPeers lets any BitTorrent client join, without TLS. For development.
	StockPeers bool `yaml:"stock_peers"`
	// TLS is mutual TLS with the other peers; the same in every origin and agent, and not together with StockPeers.
	TLS transport.PeerTLS `yaml:"tls"`
	// Rates bound the traffic of blobs, e.g. 25Mbit/s; 0 is unlimited. PUT /limits on admin changes them.
	swarm.Rates `yaml:",inline"`
	// LinkRate is the speed of this node's link, where it is what bounds pulls: uploads to peers are then paced a little under it,
	// because a full uplink delays the acknowledgements of the node's own downloads, and peers have little more on their way here than
	// keeps the link busy. 0: not known, neither is done.
	LinkRate config.Rate `yaml:"link_rate"`
	// AnnounceFor is how long after its last use (pulled, read here, or asked for by a peer) a blob is announced to the tracker, default 1h.
	// Older ones stay in the cache, and others get them from the origins first.
	AnnounceFor config.Duration `yaml:"announce_for"`
	// StallTimeout is how long a pull may go without a new piece before it is read without leases from origins that
	// can't be asked for one, and how long one origin may go without sending before the next is asked, for pieces
	// as for whole blobs over HTTP, default 2s.
	StallTimeout config.Duration `yaml:"stall_timeout"`
}

// pace is the share of the link that uploads may take.
const pace = 0.9

// rates are the limits to begin with: uploads are bounded by upload_rate and by the pace of the link.
func (p Peer) rates() swarm.Rates {
	r := p.Rates
	paced := config.Rate(pace * float64(p.LinkRate))
	if paced > 0 && (r.UploadRate == 0 || paced < r.UploadRate) {
		r.UploadRate = paced
	}
	return r
}

// Cache configures the disk.
type Cache struct {
	// Dir is a folder that only this agent uses.
	Dir string `yaml:"dir"`
	// Capacity bounds the bytes on disk; 0 is unbounded. Least recently used blobs go first.
	Capacity   config.Size `yaml:"capacity"`
	store.Keep `yaml:",inline"`
}

// Validate fills in defaults and refuses what can't work.
func (c *Config) Validate() error {
	if c.Replicas == 0 {
		c.Replicas = 2
	}
	if c.SmallBlob == 0 {
		c.SmallBlob = 1 << 20
	}
	if c.ManifestTTL == 0 {
		c.ManifestTTL = config.Duration(time.Minute)
	}
	if c.StaleTags == 0 {
		c.StaleTags = config.Duration(24 * time.Hour)
	}
	if c.BuildIndexWait == 0 {
		c.BuildIndexWait = config.Duration(10 * time.Second)
	}
	if c.Client.DialTimeout == 0 {
		c.Client.DialTimeout = config.Duration(transport.DefaultDialTimeout)
	}
	if c.Peer.AnnounceFor == 0 {
		c.Peer.AnnounceFor = config.Duration(time.Hour)
	}
	if c.Client.ProgressTimeout == 0 {
		c.Client.ProgressTimeout = config.Duration(transport.DefaultProgressTimeout)
	}
	if c.Peer.StallTimeout == 0 {
		c.Peer.StallTimeout = config.Duration(2 * time.Second)
	}
	var errs []error
	need := func(key, v string) {
		if v == "" {
			errs = append(errs, fmt.Errorf("%s: is needed", key))
		}
	}
	need("server.listen", c.Server.Listen)
	need("peer.listen", c.Peer.Listen)
	need("cache.dir", c.Cache.Dir)
	need("build_index.url", c.BuildIndex.URL)
	need("tracker.url", c.Tracker.URL)
	if err := c.Peer.Rates.Validate(); err != nil {
		errs = append(errs, fmt.Errorf("peer: %w", err))
	}
	if c.Peer.StockPeers && c.Peer.TLS != (transport.PeerTLS{}) {
		errs = append(errs, errors.New("peer: stock_peers can't speak tls, set one of both"))
	}
	if c.Peer.AnnounceFor < 0 || c.Peer.StallTimeout < 0 || c.Peer.LinkRate < 0 {
		errs = append(errs, errors.New("peer: announce_for, stall_timeout and link_rate must not be negative"))
	}
	if len(c.Origins) == 0 {
		errs = append(errs, errors.New("origins: at least one is needed"))
	}
	for i, o := range c.Origins {
		if o.ID == "" || o.URL == "" {
			errs = append(errs, fmt.Errorf("origins[%d]: id and url are needed", i))
		}
	}
	if err := c.Cache.Validate(); err != nil {
		errs = append(errs, fmt.Errorf("cache: %w", err))
	}
	if c.Replicas < 1 || c.SmallBlob < 0 || c.Cache.Capacity < 0 || c.ManifestTTL < 0 || c.StaleTags < 0 || c.BuildIndexWait < 0 {
		errs = append(errs, errors.New("replicas, small_blob, cache.capacity, manifest_ttl, build_index_wait and stale_tags must not be negative"))
	}
	return errors.Join(errs...)
}
