package sim

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// Plan is a run: what clients do and what breaks, and when. The seed decides it; a failing one is made smaller by
// leaving steps out.
type Plan struct {
	Seed    uint64
	Origins int
	Twin    bool // there is a second build-index
	Epochs  []Epoch
}

// Epoch is a time of disturbance, after which all is healed and checked.
type Epoch []Step

// Step is one thing that happens.
type Step struct {
	At time.Duration // since the epoch began
	Do Action
	// Node and Other are numbers of nodes, Proxy of the client that does something.
	Node, Other, Proxy int
	// Repo, Tag, Image and Blob are numbers.
	Repo, Tag, Image, Blob int
	Push                   Push
	Latency                time.Duration
	Share                  float64
}

// Action is what a step does.
type Action string

// What happens. Faults are counted; the ends of what lasts, and what clients do, are not.
const (
	Kill       Action = "kill"       // as kill -9 does
	Vanish     Action = "vanish"     // the machine loses power, and nobody is told
	PowerLoss  Action = "power loss" // as kill, and the disk forgets what was not synced
	Start      Action = "start"
	Freeze     Action = "freeze" // as SIGSTOP does
	Thaw       Action = "thaw"
	Part       Action = "part" // two machines don't reach each other
	Join       Action = "join"
	Reset      Action = "reset"  // connections of a machine
	Finish     Action = "finish" // both directions of them
	Late       Action = "late"   // a share of all segments comes up to a second later
	Twice      Action = "twice"  // a share of all connection attempts comes twice
	BucketDown Action = "bucket down"
	BucketHung Action = "bucket hung"
	BucketUp   Action = "bucket up"
	BucketSlow Action = "bucket slow" // Latency and Share of errors
	DiskSlow   Action = "disk slow"
	Wipe       Action = "wipe" // a new disk, after a kill
	Snapshot   Action = "snapshot"
	Revert     Action = "revert" // to the snapshot, after a kill
	Flip       Action = "flip"   // a bit of a blob
	Stop       Action = "stop"   // as SIGTERM does
	Copy       Action = "copy"   // the database of Other to Node, which is killed: its snapshot where Share is not 0
	Switch     Action = "switch" // the address of build-index leads proxies to Node

	DoPush        Action = "push"
	DoRace        Action = "race" // two pushes of one tag
	DoPull        Action = "pull"
	DoMount       Action = "mount"
	DoDeleteTag   Action = "delete tag"
	DoDeleteImage Action = "delete image"
	DoDeleteBlob  Action = "delete blob"
)

// ofClient says that it is a client who does it.
func (a Action) ofClient() bool {
	switch a {
	case DoPush, DoRace, DoPull, DoMount, DoDeleteTag, DoDeleteImage, DoDeleteBlob:
		return true
	}
	return false
}

// onsets are the actions that count as faults.
var onsets = []Action{Kill, Vanish, PowerLoss, Freeze, Part, Reset, Finish, Late, Twice, BucketDown, BucketHung, BucketSlow, DiskSlow, Wipe, Revert, Flip}

// Faults is how many faults a plan has.
func (p Plan) Faults() (n int) {
	for _, e := range p.Epochs {
		for _, s := range e {
			if slices.Contains(onsets, s.Do) && !(s.Do == Late || s.Do == Twice || s.Do == BucketSlow || s.Do == DiskSlow) || s.Share > 0 || s.Latency > 0 {
				n++
			}
		}
	}
	return n
}

// String is a line a step.
func (p Plan) String() string {
	var b strings.Builder
	second := ""
	if p.Twin {
		second = ", two build-indexes"
	}
	fmt.Fprintf(&b, "seed %d, %d origins%s, %d faults\n", p.Seed, p.Origins, second, p.Faults())
	for i, e := range p.Epochs {
		fmt.Fprintf(&b, "epoch %d\n", i+1)
		for _, s := range e {
			fmt.Fprintf(&b, "  %s %s\n", stamp(s.At), s)
		}
	}
	return b.String()
}

// String says what of a step matters.
func (s Step) String() string {
	repo := fmt.Sprintf("team/%c", 'a'+s.Repo)
	switch s.Do {
	case DoPush, DoRace:
		return fmt.Sprintf("%s image %d to %s:v%d by proxy %d, %+v", s.Do, s.Image, repo, s.Tag, s.Proxy, s.Push)
	case DoPull, DoDeleteTag:
		return fmt.Sprintf("%s %s:v%d by proxy %d", s.Do, repo, s.Tag, s.Proxy)
	case DoDeleteImage:
		return fmt.Sprintf("%s %d of %s by proxy %d", s.Do, s.Image, repo, s.Proxy)
	case DoDeleteBlob:
		return fmt.Sprintf("%s %d of %s by proxy %d", s.Do, s.Blob, repo, s.Proxy)
	case DoMount:
		return fmt.Sprintf("%s blob %d of team/%c in %s by proxy %d", s.Do, s.Blob, 'a'+s.Other, repo, s.Proxy)
	case Switch:
		return fmt.Sprintf("%s to node %d for %s", s.Do, s.Node, []string{"proxy 0", "proxy 1", "both proxies"}[s.Proxy])
	case Copy:
		return fmt.Sprintf("%s node %d from %d, %.0f", s.Do, s.Node, s.Other, s.Share)
	case Part, Join:
		return fmt.Sprintf("%s nodes %d and %d", s.Do, s.Node, s.Other)
	case Late, Twice:
		return fmt.Sprintf("%s %.2f", s.Do, s.Share)
	case BucketSlow:
		return fmt.Sprintf("%s %s, %.2f fail", s.Do, s.Latency, s.Share)
	case BucketDown, BucketHung, BucketUp:
		return string(s.Do)
	case DiskSlow:
		return fmt.Sprintf("%s %s at node %d", s.Do, s.Latency, s.Node)
	case Flip:
		return fmt.Sprintf("%s a bit of blob %d at node %d", s.Do, s.Blob, s.Node)
	}
	return fmt.Sprintf("%s node %d", s.Do, s.Node)
}

// Profile is what a plan may have.
type Profile struct {
	Epochs, Faults, Ops int // of an epoch the last two
	Length              time.Duration
	// Without are actions that plans leave out; the value says why.
	Without map[Action]string
	// WithoutNode are actions left out for one node: "build-index revert".
	WithoutNode map[string]string
}

const (
	repos  = 3
	tags   = 2
	images = 6
	blobs  = 9
)

// generator makes a plan.
type generator struct {
	Profile
	rnd     *rand.Rand
	origins int
	steps   []Step
	losses  int
}

// Generate returns the plan of a seed.
func (p Profile) Generate(seed uint64) Plan {
	g := &generator{Profile: p, rnd: rand.New(rand.NewPCG(seed, 9))}
	g.origins = 3 + []int{0, 0, 0, 1, 2}[g.rnd.IntN(5)]
	out := Plan{Seed: seed, Origins: g.origins}
	for range p.Epochs {
		g.steps, g.losses = nil, 0
		for range p.Ops {
			g.op()
		}
		for n := 0; n < p.Faults; {
			if g.fault() {
				n++
			}
		}
		slices.SortStableFunc(g.steps, func(a, b Step) int { return int(a.At - b.At) })
		out.Epochs = append(out.Epochs, g.steps)
	}
	p.addTwin(&out)
	return out
}

func (g *generator) allowed(a Action, node string) bool {
	if _, no := g.Without[a]; no {
		return false
	}
	_, no := g.WithoutNode[node+" "+string(a)]
	return !no
}

func (g *generator) time() time.Duration { return time.Duration(g.rnd.Int64N(int64(g.Length))) }

// op adds what a client does.
func (g *generator) op() {
	kinds := []Action{DoPush, DoPush, DoPush, DoPush, DoRace, DoPull, DoPull, DoMount, DoDeleteTag, DoDeleteImage, DoDeleteBlob}
	s := Step{At: g.time(), Do: kinds[g.rnd.IntN(len(kinds))], Proxy: g.rnd.IntN(2), Repo: g.rnd.IntN(repos), Other: g.rnd.IntN(repos),
		Tag: g.rnd.IntN(tags), Image: g.rnd.IntN(images), Blob: g.rnd.IntN(blobs),
		Push: Push{Chunks: []int{0, 0, 1, 3}[g.rnd.IntN(4)], Hint: g.rnd.IntN(2) == 0, Spread: g.rnd.IntN(4) == 0, Skip: g.rnd.IntN(2) == 0}}
	if g.allowed(s.Do, "") {
		g.steps = append(g.steps, s)
	}
}

// node picks a machine, an origin more often than not.
func (g *generator) node() (n int, kind string) {
	switch g.rnd.IntN(8) {
	case 0:
		return g.origins, "build-index"
	case 1:
		return g.origins + 1 + g.rnd.IntN(2), "proxy"
	}
	return g.rnd.IntN(g.origins), "origin"
}

// lasting is how long a disturbance goes on: mostly short, sometimes longer than all patience.
func (g *generator) lasting() time.Duration {
	switch g.rnd.IntN(4) {
	case 0:
		return time.Duration(g.rnd.Int64N(int64(100 * time.Millisecond)))
	case 1, 2:
		return time.Duration(g.rnd.Int64N(int64(5 * time.Second)))
	}
	return time.Duration(g.rnd.Int64N(int64(40 * time.Second)))
}

// moment is a time at which something may be going on: shortly after a client began to do something.
func (g *generator) moment() time.Duration {
	if len(g.steps) == 0 || g.rnd.IntN(4) == 0 {
		return g.time()
	}
	return g.steps[g.rnd.IntN(len(g.steps))].At + time.Duration(g.rnd.Int64N(int64(150*time.Millisecond)))
}

// fault adds a fault and its end, and reports whether it did.
func (g *generator) fault() bool {
	at, d := g.moment(), g.lasting()
	n, kind := g.node()
	a := onsets[g.rnd.IntN(len(onsets))]
	if !g.allowed(a, kind) {
		return false
	}
	s := Step{At: at, Do: a, Node: n}
	end := Step{At: at + d, Node: n}
	switch a {
	case Kill:
		end.Do = Start
	case Vanish, PowerLoss:
		if kind == "proxy" {
			return false
		}
		end.Do = Start
	case Freeze:
		end.Do = Thaw
	case Part:
		s.Other = g.rnd.IntN(g.origins + 3)
		if s.Other == n {
			return false
		}
		end.Do, end.Other = Join, s.Other
	case Reset, Finish:
		end.Do = ""
	case Late, Twice:
		s.Share = 0.3 * g.rnd.Float64()
		end.Do = a
	case BucketDown, BucketHung:
		end.Do = BucketUp
	case BucketSlow:
		s.Latency, s.Share = time.Duration(1+g.rnd.IntN(2000))*time.Millisecond, 0.4*g.rnd.Float64()
		end.Do, end.Latency = a, 0
	case DiskSlow:
		if kind != "origin" {
			return false
		}
		s.Latency = time.Duration(1+g.rnd.IntN(2000)) * time.Millisecond
		end.Do = a
	default:
		return g.loss(s, kind)
	}
	g.steps = append(g.steps, s)
	if end.Do != "" {
		g.steps = append(g.steps, end)
	}
	return true
}

// loss adds the loss of a disk, or of a part of it: one in an epoch.
func (g *generator) loss(s Step, kind string) bool {
	if kind == "proxy" || g.losses > 0 || s.Do == Flip && kind != "origin" {
		return false
	}
	g.losses++
	start := Step{At: s.At + g.lasting(), Do: Start, Node: s.Node}
	switch s.Do {
	case Flip:
		s.Blob = g.rnd.IntN(blobs)
		g.steps = append(g.steps, s)
		return true
	case Revert:
		g.steps = append(g.steps, Step{At: time.Duration(g.rnd.Int64N(int64(s.At) + 1)), Do: Snapshot, Node: s.Node})
	}
	g.steps = append(g.steps, s, start)
	return true
}
