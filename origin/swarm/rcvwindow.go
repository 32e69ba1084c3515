package swarm

import (
	"time"

	"kraken/proto/config"
)

// Where the link is what bounds pulls, each peer that sends is allowed megabytes by the kernel, and all of it waits in the queue before
// the link: the queue overflows, and what an origin sends waits behind it. A peer's share of a short queue keeps the link busy as well.
const (
	// queueTime is for how long the link is busy with what all peers together may have in its queue.
	queueTime = 50 * time.Millisecond
	// minReceive is five full segments of Ethernet: with less a sender waits for acknowledgements that are delayed.
	minReceive = 8 << 10
	// maxReceive is what is left to the kernel, which finds out by itself what a connection needs. It takes no more than net.core.rmem_max,
	// 208 KiB as a rule, from a process.
	maxReceive = 128 << 10
)

// receiveWindow is how many bytes one of some peers may have on its way to this node through a link of a rate, in bytes a second: what fills the
// path, whose round trip is rtt, so that one peer alone can keep the link busy, and its share of the queue. 0: the kernel decides.
func receiveWindow(link config.Rate, peers int, rtt time.Duration) int {
	if link <= 0 {
		return 0
	}
	w := float64(link) * (rtt + queueTime/time.Duration(max(peers, 1))).Seconds()
	if w > maxReceive {
		return 0
	}
	return max(int(w), minReceive)
}

// share gives each connection its window. It follows their number in steps, because each is a system call. mu is held.
func (s *Swarm) share() {
	if s.cfg.LinkRate <= 0 {
		return
	}
	for c := range s.conns {
		if c.tcp == nil {
			continue
		}
		w := receiveWindow(s.cfg.LinkRate, len(s.conns), c.rtt)
		if w == 0 && c.receive != 0 {
			w = maxReceive // the kernel does not take back what it was told once
		}
		if w > c.receive*3/4 && w < c.receive*5/4 {
			continue
		}
		if w != c.receive && c.tcp.SetReadBuffer(w) == nil {
			c.receive = w
		}
	}
}
