package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"time"
)

// A second build-index, as an operator's mistake or a rolling update brings it: with a database of its own, empty or a
// copy of the first one's, now or older. Proxies have an address of build-index that leads to one of the two, and is
// led to the other by hand, for each proxy at its time. What is connected stays so, as where a DNS name changes.

// movable is the address of build-index where there are two.
const movable = "10.255.0.1"

// addTwin adds the second build-index, which is down and has an empty disk.
func (s *Sim) addTwin() {
	s.twin = s.node("build-index-2", openIndex)
	s.twin.database = s.folder(s.twin.name)
	s.lead(s.index, 2)
}

// indexAddr is where proxies expect build-index.
func (s *Sim) indexAddr() string {
	if s.Twin {
		return movable + ":80"
	}
	return s.index.h.addr()
}

// lead makes the address of build-index lead one proxy to n, or both for 2.
func (s *Sim) lead(n *node, proxy int) {
	s.net.mu.Lock()
	defer s.net.mu.Unlock()
	s.serving = n
	for i, p := range s.proxies {
		if proxy == i || proxy == 2 {
			s.net.moved[p.name] = n.h
		}
	}
}

// mayEnd says that a role ends by itself as it should: another build-index has taken over, or may have.
func (s *Sim) mayEnd(n *node, err error) bool {
	held, stood := strings.Contains(err.Error(), "another build-index holds the origins"), strings.Contains(err.Error(), "stood still for longer than its lease")
	return n.database != "" && (stood || held && s.twin != nil)
}

// supervise starts those again that have ended by themselves, as they may.
func (s *Sim) supervise() {
	for _, n := range []*node{s.index, s.twin} {
		if n == nil {
			continue
		}
		if p := n.ended.Swap(nil); p != nil && p == n.p.Load() {
			n.kill(false)
			n.start()
		}
	}
}

// reconcile does what an operator does who finds two build-indexes: proxies are led to one, and the other is ended. It
// returns the other.
func (s *Sim) reconcile() (idle *node) {
	if s.twin == nil {
		return nil
	}
	if idle = s.twin; s.serving == s.twin {
		idle = s.index
	}
	s.lead(s.serving, 2)
	s.standsBy = idle.p.Load() != nil
	idle.kill(false)
	return idle
}

// standBy starts the build-index again that was ended because there are two: it waits.
func (s *Sim) standBy() {
	if !s.standsBy {
		return
	}
	s.standsBy = false
	for _, n := range []*node{s.index, s.twin} {
		n.start()
	}
}

// answers returns nil when the build-index that proxies are led to is the only one.
func (s *Sim) answers() error {
	if s.twin == nil {
		return nil
	}
	return s.isAnswered(s.serving)
}

func (s *Sim) isAnswered(n *node) error {
	ctx, cancel := context.WithTimeout(context.Background(), defaultTimeout)
	defer cancel()
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+n.h.addr()+"/v2/", nil)
	if err != nil {
		return err
	}
	resp, err := s.clients[0].hc.Do(q)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusServiceUnavailable {
		return fmt.Errorf("%s: %s", n.name, resp.Status)
	}
	return nil
}

// stop ends a role as SIGTERM does, and kills it when that takes too long.
func (n *node) stop() {
	if n.p.Load() == nil {
		return
	}
	n.cancel()
	select {
	case <-n.done:
	case <-time.After(10 * time.Second):
	}
	n.kill(false)
}

// copyOf gives a build-index, which is killed, a copy of the database of another, as it is now or when the last
// snapshot was made.
func (n *node) copyOf(other *node, old bool) {
	from := other.database
	if old && other.old != "" {
		from = other.old
	}
	n.kill(false)
	if err := n.copyDatabase(from); err != nil {
		n.s.history.violate("sim", "copy the database of %s: %v", other.name, err)
	}
}

// twinOneIn is how many seeds there are for each that has a second build-index.
const twinOneIn = 4

// addTwin gives a share of the plans a second build-index. It draws for itself, so that the others stay as they are.
func (p Profile) addTwin(out *Plan) {
	g := &twins{generator{Profile: p, rnd: rand.New(rand.NewPCG(out.Seed, 10)), origins: out.Origins}}
	if g.rnd.IntN(twinOneIn) > 0 {
		return
	}
	out.Twin = true
	has, other := out.Origins, out.Origins+3
	for i, e := range out.Epochs {
		if i > 0 && g.rnd.IntN(4) == 0 {
			continue
		}
		// A database that is older or empty is a disk that is lost: the one of this epoch. And often little else fails,
		// so that one takes over from another as is meant.
		calm := g.rnd.IntN(2) == 0
		g.steps = slices.DeleteFunc(slices.Clone(e), func(s Step) bool {
			return s.Do == Wipe || s.Do == Revert || s.Do == Flip || calm && !s.Do.ofClient() && g.rnd.IntN(4) > 0
		})
		at := g.within(p.Length / 2)
		for again := true; again; again = at < p.Length && g.rnd.IntN(3) == 0 {
			if g.meet(at, has, other) {
				has, other = other, has
			}
			g.ask()
			at += 5*time.Second + g.within(10*time.Second)
		}
		slices.SortStableFunc(g.steps, func(a, b Step) int { return int(a.At - b.At) })
		out.Epochs[i] = g.steps
	}
}

// twins makes up what two build-indexes do.
type twins struct{ generator }

// ask adds what clients do around the last steps.
func (g *twins) ask() {
	last := g.steps[len(g.steps)-1]
	for range g.Ops {
		if g.op(); g.steps[len(g.steps)-1].Do.ofClient() {
			g.steps[len(g.steps)-1].At = max(0, last.At+g.within(8*time.Second)-2*time.Second)
		}
	}
}

func (g *twins) within(d time.Duration) time.Duration { return time.Duration(g.rnd.Int64N(int64(d))) }

func (g *twins) add(at time.Duration, s Step) {
	s.At = max(0, at)
	g.steps = append(g.steps, s)
}

// meet adds how the build-index of a number, which proxies are led to, meets the other, at about a time. It reports
// whether proxies are led to the other then.
func (g *twins) meet(at time.Duration, has, other int) (moved bool) {
	begins := at + g.within(13*time.Second) - 8*time.Second
	g.begin(max(0, begins), other, has)
	switch g.rnd.IntN(8) {
	case 0: // it stays, and the other waits; and gives up, or does not
		if g.rnd.IntN(2) == 0 {
			ends := begins + g.within(15*time.Second)
			g.add(ends, Step{Do: []Action{Kill, Stop}[g.rnd.IntN(2)], Node: other})
			g.add(ends+g.within(10*time.Second), Step{Do: Start, Node: other})
		}
		if g.rnd.IntN(2) == 0 {
			return false
		}
	case 1, 2, 3:
		g.add(at, Step{Do: Freeze, Node: has})
		long := []time.Duration{5 * time.Second, 10 * time.Second, 25 * time.Second, 25 * time.Second}[g.rnd.IntN(4)]
		g.add(at+g.within(long), Step{Do: Thaw, Node: has})
	default:
		g.add(at, Step{Do: []Action{Kill, Vanish, Stop, Stop}[g.rnd.IntN(4)], Node: has})
		if g.rnd.IntN(2) == 0 {
			g.add(at+g.within(20*time.Second), Step{Do: Start, Node: has})
		}
	}
	switch at := at + g.within(10*time.Second); g.rnd.IntN(6) {
	case 0:
		return false // nobody sees to it
	case 1, 2: // one proxy later than the other
		for proxy := range 2 {
			g.add(at+g.within(15*time.Second), Step{Do: Switch, Node: other, Proxy: proxy})
		}
	case 3: // there and back and there
		g.add(at, Step{Do: Switch, Node: other, Proxy: g.rnd.IntN(3)})
		g.add(at+g.within(5*time.Second), Step{Do: Switch, Node: has, Proxy: g.rnd.IntN(3)})
		g.add(at+5*time.Second+g.within(5*time.Second), Step{Do: Switch, Node: other, Proxy: 2})
	default:
		g.add(at, Step{Do: Switch, Node: other, Proxy: 2})
	}
	return true
}

// begin adds the start of a build-index with a database that is empty, a copy of another's, or what it had before.
func (g *twins) begin(at time.Duration, n, from int) {
	switch g.rnd.IntN(5) {
	case 0:
		g.add(at, Step{Do: Wipe, Node: n})
	case 1:
		g.add(at, Step{Do: Copy, Node: n, Other: from})
	case 2, 3:
		g.add(g.within(at+1), Step{Do: Snapshot, Node: from})
		g.add(at, Step{Do: Copy, Node: n, Other: from, Share: 1})
	}
	g.add(at+g.within(time.Second), Step{Do: Start, Node: n})
}

// begun is the build-index that answers, nil when none does.
func (s *Sim) begun() *node {
	for _, n := range []*node{s.index, s.twin} {
		if s.isAnswered(n) == nil {
			return n
		}
	}
	return nil
}
