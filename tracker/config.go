package tracker

import (
	"fmt"
	"time"

	"kraken/proto/config"
	"kraken/proto/role"
)

// Config is the whole configuration of a tracker; deploy/config/tracker.yaml is the commented sample. Agents and stock clients announce to its server, which
// also has the page for operators; its advertise is the address in .torrent files, default whatever address the .torrent was asked at.
type Config struct {
	role.Config `yaml:",inline"`
	// StockPeers serves BEP 3 announces and .torrent files, so that any BitTorrent client can join. Off by default: whoever can
	// reach this listener could then read every blob of which it knows the digest, and announce what it likes.
	StockPeers bool `yaml:"stock_peers"`
	// TrustAnnouncedIP takes a stock client's "ip" parameter for its address, for clients behind a NAT. Danger: anyone can then
	// make every peer dial any address.
	TrustAnnouncedIP bool `yaml:"trust_announced_ip"`
	// Interval is the time between two announces of a peer, 1s to 10m, default 10s. A peer that was not heard of for three is
	// forgotten.
	Interval config.Duration `yaml:"interval" config:"positive"`
	// PeersPerAnswer bounds the peers in one answer, 2 to 200, default 40.
	PeersPerAnswer int `yaml:"peers_per_answer" config:"positive"`
	// MetainfoMemory bounds the metainfo that is kept, default 256MiB. A blob of 1 GiB has 10 KiB of it.
	MetainfoMemory config.Size `yaml:"metainfo_memory" config:"positive"`
	Limits         Limits      `yaml:"limits"`
}

// Limits bound the memory that announcers can take. Who comes when a limit is reached is answered, but not given to others.
type Limits struct {
	Peers int `yaml:"peers" config:"positive"` // distinct peers, default 100,000; about 400 bytes each
	Pairs int `yaml:"pairs" config:"positive"` // peers times the blobs that each has, default 2,000,000; about 60 bytes each, 160 in large swarms that all are fetching
	Swarm int `yaml:"swarm" config:"positive"` // peers of one blob, default 20,000
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
	var m config.Mistakes
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
	if c.TrustAnnouncedIP && !c.StockPeers {
		m.Add("trust_announced_ip", "has no meaning without stock_peers")
	}
	return m.Err()
}
