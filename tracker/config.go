package tracker

import (
	"fmt"
	"time"

	"kraken/proto/config"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// Config is the whole configuration of a tracker; deploy/config/tracker.yaml is the commented sample. Agents and stock
// clients announce to its server, which also has the page for operators; its advertise is the address in .torrent
// files, default whatever address the .torrent was asked at.
type Config struct {
	role.Config `yaml:",inline"`
	// StockPeers serves BEP 3 announces and .torrent files, so that any BitTorrent client can join. Off by default:
	// whoever can reach this listener could then read every blob of which it knows the digest, and announce what it
	// likes.
	StockPeers bool `yaml:"stock_peers"`
	// TrustAnnouncedIP believes the address that a peer announces (the "ip" parameter of a stock client), for peers
	// behind a NAT or a tracker behind a proxy; loopback, link-local and metadata addresses are refused all the same.
	// Off by default: a peer is given to others at the address that it announces from, or at one that its client
	// certificate names. Danger: anyone can then make every peer dial any address.
	TrustAnnouncedIP bool `yaml:"trust_announced_ip"`
	// PrivilegedPorts gives peers with ports below 1024 to others. Off by default: what listens there is hardly ever a
	// peer.
	PrivilegedPorts bool `yaml:"privileged_ports"`
	// Interval is the time between two announces of a peer, 1s to 10m, default 10s. A peer that was not heard of for
	// three is forgotten.
	Interval config.Duration `yaml:"interval" config:"positive"`
	// PeersPerAnswer bounds the peers in one answer, 2 to 200, default 40.
	PeersPerAnswer int `yaml:"peers_per_answer" config:"positive"`
	// MetainfoMemory bounds the metainfo that is kept, default 256MiB. A blob of 1 GiB has 10 KiB of it.
	MetainfoMemory config.Size `yaml:"metainfo_memory" config:"positive"`
	Limits         Limits      `yaml:"limits"`
}

// Limits bound the memory that announcers can take. When one is reached, the idlest peers of the source that has taken
// most make room; who comes when no source has taken more than its share is answered, but not given to others. A source
// is an address (a /64 of IPv6), or an address with a client certificate.
type Limits struct {
	Peers int `yaml:"peers" config:"positive"` // distinct peers, default 100,000; about 500 bytes each
	// peers times the blobs that each has, default 2,000,000; about 60 bytes each, 160 in large swarms that all are
	// fetching
	Pairs int `yaml:"pairs" config:"positive"`
	Swarm int `yaml:"swarm" config:"positive"` // peers of one blob, default 20,000
	// Unconfirmed bounds the blobs that peers announce and of which no origin has said yet that it knows them, default
	// 50,000; about 600 bytes each. They are given to others meanwhile, so that peers are found while origins are down;
	// what origins don't know is dropped.
	Unconfirmed int `yaml:"unconfirmed" config:"positive"`
	// The same for one source. All agents behind one address, of a NAT or a proxy, are one.
	SourcePeers       int `yaml:"source_peers" config:"positive"`       // default 2,000
	SourcePairs       int `yaml:"source_pairs" config:"positive"`       // default 400,000
	SourceUnconfirmed int `yaml:"source_unconfirmed" config:"positive"` // default 10,000
}

func (l Limits) bounds() bounds {
	return bounds{
		peers: l.Peers, pairs: l.Pairs, swarm: l.Swarm, unconfirmed: l.Unconfirmed,
		sourcePeers: l.SourcePeers, sourcePairs: l.SourcePairs, sourceUnconfirmed: l.SourceUnconfirmed,
	}
}

func preset[T comparable](v *T, to T) {
	var zero T
	if *v == zero {
		*v = to
	}
}

// Validate fills in defaults and refuses what can't work.
func (c *Config) Validate() error {
	preset(&c.Interval, config.Duration(10*time.Second))
	preset(&c.PeersPerAnswer, 40)
	preset(&c.MetainfoMemory, 256<<20)
	preset(&c.Limits.Peers, 100_000)
	preset(&c.Limits.Pairs, 2_000_000)
	preset(&c.Limits.Swarm, 20_000)
	preset(&c.Limits.Unconfirmed, 50_000)
	preset(&c.Limits.SourcePeers, 2_000)
	preset(&c.Limits.SourcePairs, 400_000)
	preset(&c.Limits.SourceUnconfirmed, 10_000)
	var m config.Mistakes
	c.Role = transport.RoleTracker
	c.Config.Validate(&m)
	for i, o := range c.Origins {
		if o.Peer == "" && c.StockPeers {
			m.Add(fmt.Sprintf("origins[%d].peer", i), "is needed with stock_peers, which gives it to stock clients")
		}
	}
	if i := time.Duration(c.Interval); i < time.Second || i > 10*time.Minute {
		m.Add("interval", "%s is not in 1s..10m", i)
	}
	if c.PeersPerAnswer < 2 || c.PeersPerAnswer > 200 {
		m.Add("peers_per_answer", "%d is not in 2..200", c.PeersPerAnswer)
	}
	config.NotNegative(&m, "metainfo_memory", c.MetainfoMemory)
	config.NotNegative(&m, "limits.peers", c.Limits.Peers)
	config.NotNegative(&m, "limits.pairs", c.Limits.Pairs)
	config.NotNegative(&m, "limits.swarm", c.Limits.Swarm)
	config.NotNegative(&m, "limits.unconfirmed", c.Limits.Unconfirmed)
	config.NotNegative(&m, "limits.source_peers", c.Limits.SourcePeers)
	config.NotNegative(&m, "limits.source_pairs", c.Limits.SourcePairs)
	config.NotNegative(&m, "limits.source_unconfirmed", c.Limits.SourceUnconfirmed)
	return m.Err()
}
