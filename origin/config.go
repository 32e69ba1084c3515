package origin

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"time"

	"kraken/origin/bucket"
	"kraken/origin/store"
	"kraken/origin/swarm"
	"kraken/origin/upstream"
	"kraken/proto/cluster"
	"kraken/proto/config"
	"kraken/proto/ring"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// Config is the whole configuration of an origin; deploy/config/origin.yaml is the commented sample. Its server is the
// registry API for the other roles; its admin also shows the state of write-back.
type Config struct {
	role.Config `yaml:",inline"`
	// ID is this origin's entry in Origins. It decides what this origin owns: never rename one.
	ID string `yaml:"id"`
	// Dir is a folder that only this origin uses.
	Dir string `yaml:"dir"`
	// Capacity bounds the bytes on disk; 0 is unbounded. What is not written back is never evicted.
	Capacity   config.Size `yaml:"capacity"`
	store.Keep `yaml:",inline"`
	// Buckets are the durable storage; the first whose pattern matches a repository is its bucket.
	Buckets []bucket.Config `yaml:"buckets"`
	// RecordKeys are the public keys of build-index, whose name records and deletions are taken: 32 bytes in base64, or
	// file: and the path of a PEM file; several for a change of keys. Default none: all are taken, and readiness says
	// so.
	RecordKeys []string `yaml:"record_keys"`
	// BuildIndexNames and ProxyNames are older names of certificate_roles.build-index and certificate_roles.proxy.
	BuildIndexNames []string `yaml:"build_index_names"`
	ProxyNames      []string `yaml:"proxy_names"`
	// Peer is the BitTorrent side.
	Peer Peer `yaml:"peer"`
	// UploadIdle is after how long without a byte an upload session is removed, default 1h.
	UploadIdle config.Duration `yaml:"upload_idle" config:"positive"`
	// Uploads bounds upload sessions, in all and by source.
	Uploads store.Sessions `yaml:"uploads"`
	// Takeover is after how long the second owner writes a blob back itself, when the first has not, default 30s.
	Takeover config.Duration `yaml:"takeover" config:"positive"`
	// WritebackWorkers is how many blobs are written back at once, default 4.
	WritebackWorkers int `yaml:"writeback_workers" config:"positive"`
	// Leasers is how many agents are handed pieces of one blob at once, default 64; others trade meanwhile.
	Leasers int `yaml:"leasers" config:"positive"`
	// Upstreams are the registries that the cluster mirrors: whose blobs this origin reads. The same section as
	// build-index'. Default none.
	Upstreams upstream.Config `yaml:"upstreams"`
	// OpenFS opens Dir, nil is the operating system's file system. Set by tests.
	OpenFS func(dir string) (store.FS, error) `yaml:"-"`
}

// Peer configures the BitTorrent listener.
type Peer struct {
	Listen string `yaml:"listen"`
	// Off makes the origin seed no swarm: agents have its blobs over HTTP alone. Then listen is not needed.
	Off bool `yaml:"off"`
	// StockPeers lets any BitTorrent client join. For development.
	StockPeers bool `yaml:"stock_peers"`
	// TLS is mutual TLS with the other peers; the same in every origin and agent, and not together with StockPeers.
	TLS transport.PeerTLS `yaml:"tls"`
	// Rates bound the traffic of blobs, e.g. 25Mbit/s; 0 is unlimited. PUT /limits on admin changes them.
	swarm.Rates `yaml:",inline"`
}

// olderNames puts names of an older key into CertificateRoles, where cluster does not make them say nothing.
func (c *Config) olderNames(r transport.Role, names []string) {
	if len(names) == 0 || c.Cluster != "" {
		return
	}
	roles := maps.Clone(c.CertificateRoles)
	if roles == nil {
		roles = map[transport.Role][]string{}
	}
	roles[r] = append(slices.Clone(roles[r]), names...)
	c.CertificateRoles = roles
}

// Validate fills in defaults and refuses what can't work.
func (c *Config) Validate() error {
	c.UploadIdle = orDefault(c.UploadIdle, config.Duration(time.Hour))
	c.Takeover = orDefault(c.Takeover, config.Duration(30*time.Second))
	c.WritebackWorkers = orDefault(c.WritebackWorkers, 4)
	c.Server.CongestionControl = orDefault(c.Server.CongestionControl, transport.CongestionAuto)
	c.Leasers = orDefault(c.Leasers, 64)
	c.olderNames(transport.RoleBuildIndex, c.BuildIndexNames)
	c.olderNames(transport.RoleProxy, c.ProxyNames)
	var m config.Mistakes
	var listeners []role.Listener
	if !c.Peer.Off {
		listeners = append(listeners, role.Listener{Key: "peer.listen", Addr: c.Peer.Listen})
	}
	c.Role = transport.RoleOrigin
	c.Config.Validate(&m, listeners...)
	m.Need("id", c.ID)
	if c.ID != "" && !slices.ContainsFunc(c.Origins, func(o ring.Member) bool { return o.ID == c.ID }) {
		m.Add("id", "%q is not among the origins: want one of their ids", c.ID)
	}
	m.Folder("dir", c.Dir)
	config.NotNegative(&m, "capacity", c.Capacity)
	m.Join("", c.Keep.Validate())
	m.Join("", bucket.ValidateAll(c.Buckets))
	for i, b := range c.Buckets {
		if f := b.Folder(); f != "" && c.Dir != "" && (within(f, c.Dir) || within(c.Dir, f)) {
			m.Add(fmt.Sprintf("buckets[%d].url", i), "%s and dir, %s, are one in the other: eviction would be at home in the bucket", f, c.Dir)
		}
	}
	m.Join("uploads", c.Uploads.Validate())
	m.Join("upstreams", c.Upstreams.Validate())
	cluster.ValidateNameKeys(&m, "record_keys", c.RecordKeys)
	c.Peer.validate(&m, "peer")
	c.ValidatePeers(&m, "peer.tls", c.Peer.TLS)
	config.NotNegative(&m, "upload_idle", c.UploadIdle)
	config.NotNegative(&m, "takeover", c.Takeover)
	config.NotNegative(&m, "writeback_workers", c.WritebackWorkers)
	config.NotNegative(&m, "leasers", c.Leasers)
	return m.Err()
}

// within reports whether a path is a folder's, or the folder itself.
func within(p, folder string) bool {
	rel, err := filepath.Rel(folder, p)
	return err == nil && filepath.IsLocal(rel)
}

func (p Peer) validate(m *config.Mistakes, key string) {
	if p.Off {
		if p.Listen != "" {
			m.Add(key+".listen", "and off exclude each other: set one")
		}
		return
	}
	m.Listen(key+".listen", p.Listen)
	if p.StockPeers && p.TLS != (transport.PeerTLS{}) {
		m.Add(key+".stock_peers", "stock BitTorrent clients can't speak tls: set stock_peers or tls, not both")
	}
	m.Join(key, p.Rates.Validate())
}

func orDefault[T comparable](v, d T) T {
	var zero T
	if v == zero {
		return d
	}
	return v
}
