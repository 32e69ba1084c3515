package tracker

import (
	"errors"
	"fmt"
	"time"

	"kraken/proto/config"
	"kraken/proto/ring"
	"kraken/proto/transport"
)

// Config is the whole configuration of a tracker; deploy/config/tracker.yaml is the commented sample.
type Config struct {
	// Server is where agents and stock clients announce, and where the page for operators is. Its advertise is the address in
	// .torrent files, default whatever address the .torrent was asked at.
	Server transport.ServerConfig `yaml:"server"`
	// Admin is where health, metrics and profiles are.
	Admin transport.ServerConfig `yaml:"admin"`
	Log   transport.LogConfig    `yaml:"log"`
	// Client is how this tracker speaks to origins.
	Client transport.ClientConfig `yaml:"client"`
	// Origins are all origins of the cluster. Ids decide who owns what: never rename one.
	Origins []ring.Member `yaml:"origins"`
	// Replicas is the number of origins that own a blob, default 2; the same in every role.
	Replicas int `yaml:"replicas"`
	// StockPeers serves BEP 3 announces and .torrent files, so that any BitTorrent client can join. Off by default: whoever can
	// reach this listener could then read every blob of which it knows the digest, and announce what it likes.
	StockPeers bool `yaml:"stock_peers"`
	// TrustAnnouncedIP takes a stock client's "ip" parameter for its address, for clients behind a NAT. Danger: anyone can then
	// make every peer dial any address.
	TrustAnnouncedIP bool `yaml:"trust_announced_ip"`
	// Interval is the time between two announces of a peer, 1s to 10m, default 10s. A peer that was not heard of for three is
	// forgotten.
	Interval config.Duration `yaml:"interval"`
	// PeersPerAnswer bounds the peers in one answer, 2 to 200, default 40.
	PeersPerAnswer int `yaml:"peers_per_answer"`
	// MetainfoMemory bounds the metainfo that is kept, default 256MiB. A blob of 1 GiB has 10 KiB of it.
	MetainfoMemory config.Size `yaml:"metainfo_memory"`
	Limits         Limits      `yaml:"limits"`
}

// Limits bound the memory that announcers can take. Who comes when a limit is reached is answered, but not given to others.
type Limits struct {
	Peers int `yaml:"peers"` // distinct peers, default 100,000; about 400 bytes each
	Pairs int `yaml:"pairs"` // peers times the blobs that each has, default 2,000,000; about 60 bytes each, 160 in large swarms that all are fetching
	Swarm int `yaml:"swarm"` // peers of one blob, default 20,000
}

func preset[T comparable](v *T, to T) {
	var zero T
	if *v == zero {
		*v = to
	}
}

// Validate fills in defaults and refuses what can't work.
func (c *Config) Validate() error {
	preset(&c.Replicas, 2)
	preset(&c.Interval, config.Duration(10*time.Second))
	preset(&c.PeersPerAnswer, 40)
	preset(&c.MetainfoMemory, 256<<20)
	preset(&c.Limits.Peers, 100_000)
	preset(&c.Limits.Pairs, 2_000_000)
	preset(&c.Limits.Swarm, 20_000)
	var errs []error
	refuse := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Server.Listen == "" {
		errs = append(errs, errors.New("server.listen: is needed"))
	}
	if len(c.Origins) == 0 {
		errs = append(errs, errors.New("origins: at least one is needed"))
	}
	seen := map[string]bool{}
	for i, o := range c.Origins {
		if o.ID == "" || o.URL == "" {
			refuse("origins[%d]: id and url are needed", i)
		}
		if seen[o.ID] {
			refuse("origins[%d]: id %q is there twice", i, o.ID)
		}
		seen[o.ID] = true
		if o.Peer == "" && c.StockPeers {
			refuse("origins[%d]: peer is needed with stock_peers, which gives it to stock clients", i)
		}
	}
	if c.Replicas < 1 {
		refuse("replicas: %d is less than 1", c.Replicas)
	}
	if i := time.Duration(c.Interval); i < time.Second || i > 10*time.Minute {
		refuse("interval: %s is not in 1s..10m", i)
	}
	if c.PeersPerAnswer < 2 || c.PeersPerAnswer > 200 {
		refuse("peers_per_answer: %d is not in 2..200", c.PeersPerAnswer)
	}
	if c.MetainfoMemory < 0 || c.Limits.Peers < 0 || c.Limits.Pairs < 0 || c.Limits.Swarm < 0 {
		refuse("metainfo_memory and limits must not be negative")
	}
	if c.TrustAnnouncedIP && !c.StockPeers {
		refuse("trust_announced_ip has no meaning without stock_peers")
	}
	return errors.Join(errs...)
}
