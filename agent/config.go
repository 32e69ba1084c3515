package agent

import (
	"net"
	"reflect"
	"time"

	"kraken/origin/store"
	"kraken/origin/swarm"
	"kraken/proto/config"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// Config is the whole configuration of an agent; deploy/config/agent.yaml is the commented sample. Its server is the
// registry for the runtimes of this node: keep it on localhost.
type Config struct {
	role.Config `yaml:",inline"`
	// Node is the name that people see, default the host's name.
	Node string `yaml:"node"`
	// Names are the registry names that mean this cluster, at least one: host or host:port, as they are in the names of
	// images that are pushed to it. A runtime's mirror request names its registry as ?ns=: for these it gets the
	// cluster's own repositories, for an upstream's name that upstream's, for any other 404, so that it goes on to that
	// registry. Without names whoever may push library/nginx would replace docker.io/library/nginx on every node.
	Names []string `yaml:"names"`
	// DockerHub is a listener that stands for docker.io, for the registry-mirrors of Docker, which says no registry's
	// name. Without listen there is none.
	DockerHub  transport.ServerConfig `yaml:"docker_hub"`
	BuildIndex role.Endpoint          `yaml:"build_index"`
	Tracker    role.Endpoint          `yaml:"tracker"`
	// Peer is the BitTorrent side.
	Peer Peer `yaml:"peer"`
	// Cache is where blobs are kept.
	Cache Cache `yaml:"cache"`
	// Access says who may pull the cluster's own repositories here. Without it everybody on this node may pull all.
	Access Access `yaml:"access"`
	// SmallBlob is the size up to which a blob is fetched straight from an origin over HTTP and not announced, default
	// 1MiB. Blobs that were cached as small ones have no metainfo and stay out of the swarm when it is lowered.
	SmallBlob config.Size `yaml:"small_blob" config:"positive"`
	// OriginPatience is how long a read of a blob of the cluster's own repositories waits while no origin can give it,
	// because origins restart or the bucket is away that alone has it, default 10s. Then it is 503. Upstreams' blobs
	// don't wait for it: runtimes can go on at the upstream.
	OriginPatience config.Duration `yaml:"origin_patience" config:"positive"`
	// ManifestTTL is how long a manifest that build-index confirmed is served by digest without asking again, default
	// 1m, and a membership of a blob. A deleted digest or blob is gone at this agent after this time. Tags are
	// confirmed on every pull.
	ManifestTTL config.Duration `yaml:"manifest_ttl" config:"positive"`
	// BuildIndexWait is how long a manifest's answer is waited for, and up to a tenth more, while build-index can be
	// connected to, default 10s. Only what is unreachable, or silent for so long, is answered for with something older.
	BuildIndexWait config.Duration `yaml:"build_index_wait" config:"positive"`
	// StaleTags is how old a tag's last confirmed digest may be to be served while build-index is unreachable, default
	// 24h.
	StaleTags config.Duration `yaml:"stale_tags" config:"positive"`
	// Watchdog is how long the agent may leave its own questions on its listener without an answer, default 30s: then
	// it closes its listeners and ends with exit code 3, because runtimes wait for one that hangs, and go on at once
	// from one that has gone. What supervises it starts it again.
	Watchdog config.Duration `yaml:"watchdog" config:"positive"`
}

// Peer configures the BitTorrent listener.
type Peer struct {
	Listen string `yaml:"listen"`
	// Advertise is the IP address, or ip:port, that other agents dial; default the listener's own. In the place of the
	// address it may be the name of a network interface: its first global address, IPv4 first.
	Advertise string `yaml:"advertise"`
	// StockPeers lets any BitTorrent client join, without TLS. For development.
	StockPeers bool `yaml:"stock_peers"`
	// TLS is mutual TLS with the other peers; the same in every origin and agent, and not together with StockPeers.
	TLS transport.PeerTLS `yaml:"tls"`
	// Rates bound the traffic of blobs, e.g. 25Mbit/s; 0 is unlimited. PUT /limits on admin changes them.
	swarm.Rates `yaml:",inline"`
	// LinkRate is the speed of this node's link, where it is what bounds pulls: uploads to peers are then paced a
	// little under it, because a full uplink delays the acknowledgements of the node's own downloads, and peers have
	// little more on their way here than keeps the link busy. 0: not known, neither is done.
	LinkRate config.Rate `yaml:"link_rate"`
	// AnnounceFor is how long after its last use (pulled, read here, or asked for by a peer) a blob is announced to the
	// tracker, default 1h. Older ones stay in the cache, and others get them from the origins first.
	AnnounceFor config.Duration `yaml:"announce_for" config:"positive"`
	// StallTimeout is how long a pull may go without a new piece before it is read without leases from origins that
	// can't be asked for one, and how long one origin may go without sending before the next is asked, for pieces
	// as for whole blobs over HTTP, default 2s.
	StallTimeout config.Duration `yaml:"stall_timeout" config:"positive"`
}

// pace is the share of the link that uploads may take.
const pace = 0.9

// rates returns the limits to begin with: uploads are bounded by upload_rate and by the pace of the link.
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
	if c.SmallBlob == 0 {
		c.SmallBlob = 1 << 20
	}
	if c.ManifestTTL == 0 {
		c.ManifestTTL = config.Duration(time.Minute)
	}
	if c.StaleTags == 0 {
		c.StaleTags = config.Duration(24 * time.Hour)
	}
	if c.Watchdog == 0 {
		c.Watchdog = config.Duration(30 * time.Second)
	}
	if c.BuildIndexWait == 0 {
		c.BuildIndexWait = config.Duration(10 * time.Second)
	}
	if c.OriginPatience == 0 {
		c.OriginPatience = config.Duration(10 * time.Second)
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
	var m config.Mistakes
	listeners := []role.Listener{{Key: "peer.listen", Addr: c.Peer.Listen}}
	if !reflect.ValueOf(c.DockerHub).IsZero() {
		listeners = append(listeners, role.Listener{Key: "docker_hub.listen", Addr: c.DockerHub.Listen})
		c.DockerHub.Validate(&m, "docker_hub")
		if c.DockerHub.Control || c.DockerHub.PProf {
			m.Add("docker_hub", "control and pprof belong to admin")
		}
	}
	c.Role = transport.RoleAgent
	c.Config.Validate(&m, listeners...)
	role.ValidateNames(&m, "names", c.Names)
	c.BuildIndex.Validate(&m, "build_index")
	c.Tracker.Validate(&m, "tracker")
	c.Peer.validate(&m, "peer")
	c.ValidatePeers(&m, "peer.tls", c.Peer.TLS)
	m.Folder("cache.dir", c.Cache.Dir)
	config.NotNegative(&m, "cache.capacity", c.Cache.Capacity)
	m.Join("cache", c.Cache.Validate())
	config.NotNegative(&m, "small_blob", c.SmallBlob)
	config.NotNegative(&m, "origin_patience", c.OriginPatience)
	config.NotNegative(&m, "manifest_ttl", c.ManifestTTL)
	config.NotNegative(&m, "build_index_wait", c.BuildIndexWait)
	config.NotNegative(&m, "stale_tags", c.StaleTags)
	if c.Watchdog < config.Duration(time.Second) {
		m.Add("watchdog", "%s is less than 1s: a busy machine would end an agent that is well", c.Watchdog)
	}
	c.Access.validate(&m, "access")
	return m.Err()
}

func (p *Peer) validate(m *config.Mistakes, key string) {
	m.Listen(key+".listen", p.Listen)
	p.Advertise = transport.ResolvePeer(m, key+".advertise", p.Advertise)
	if host, _, err := net.SplitHostPort(p.Listen); err == nil && role.Wildcard(host) && p.Advertise == "" {
		m.Add(key+".advertise", "is needed: peer.listen %s is no address that others can dial; give an IP address or the name of a network interface", p.Listen)
	}
	if p.StockPeers && p.TLS != (transport.PeerTLS{}) {
		m.Add(key+".stock_peers", "stock BitTorrent clients can't speak tls: set stock_peers or tls, not both")
	}
	m.Join(key, p.Rates.Validate())
	config.NotNegative(m, key+".announce_for", p.AnnounceFor)
	config.NotNegative(m, key+".stall_timeout", p.StallTimeout)
	config.NotNegative(m, key+".link_rate", p.LinkRate)
}
