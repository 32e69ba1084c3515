package swarm

import (
	"time"

	"kraken/proto/config"
	"kraken/proto/transport"
)

// Where the link is what bounds pulls, each peer that sends is allowed megabytes by the kernel, and all of it waits in
// the queue before the link: the queue overflows, and what an origin sends waits behind it. A peer's share of a short
// queue keeps the link busy as well.
const (
	// queueTime is for how long the link is busy with what all peers together may have in its queue.
	queueTime = 50 * time.Millisecond
	// minSegments is the least that a peer may have on its way: with three or four a sender waits for acknowledgements
	// that are delayed, and with less than one it sends by its probe timer alone.
	minSegments = 6
	// maxReceive is from where on a connection is left to the kernel. Of a process it takes no more than
	// net.core.rmem_max, 208 KiB as a rule.
	maxReceive = 128 << 10
	// shareEvery is how often the shares follow what has changed, and newPeerDelay how soon they follow a new peer: in
	// a crowd all come at once.
	shareEvery, newPeerDelay = time.Second, 50 * time.Millisecond
)

// receiveWindow returns how many bytes one of some peers may have on its way to this node through a link of a rate, in
// bytes a second: what fills the path, so that one peer alone can keep the link busy, and its share of the queue. 0:
// the kernel decides.
func receiveWindow(link config.Rate, peers int, p transport.Path) int {
	w := int(float64(link) * (p.RoundTrip + queueTime/time.Duration(max(peers, 1))).Seconds())
	w = max(w, minSegments*p.Segment)
	if w > maxReceive {
		return 0
	}
	return w
}

// shareLink gives the peers that blobs are fetched from their windows, until the Swarm is closed.
func (s *Swarm) shareLink() {
	t := time.NewTimer(shareEvery)
	defer t.Stop()
	soon := false
	for {
		select {
		case <-s.closing:
			return
		case <-s.joined:
			if !soon {
				soon = true
				t.Reset(newPeerDelay)
			}
			continue
		case <-t.C:
		}
		soon = false
		t.Reset(shareEvery)
		feeding := s.feeding()
		for _, c := range feeding {
			c.setWindow(len(feeding))
		}
	}
}

// feeding returns the connections that a Fetch may ask for something.
func (s *Swarm) feeding() (out []*conn) {
	for _, f := range s.fetches() {
		f.t.mu.Lock()
		for c := range f.t.conns {
			if !c.stranger && c.tcp != nil {
				out = append(out, c)
			}
		}
		f.t.mu.Unlock()
	}
	return out
}

// setWindow follows the number of peers in steps, because each is two system calls. Only shareLink calls it.
func (c *conn) setWindow(peers int) {
	p, ok := transport.PathOf(c.tcp)
	if !ok {
		return
	}
	w := receiveWindow(c.s.cfg.LinkRate, peers, p)
	if w == 0 {
		if c.window == 0 {
			return
		}
		w = maxReceive // the kernel does not take back what it was told once
	}
	if w > c.window*3/4 && w < c.window*5/4 {
		return
	}
	if err := transport.SetReceiveWindow(c.tcp, w); err == nil { // else it is closed
		c.window = w
	}
}
