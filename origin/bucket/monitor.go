package bucket

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"
)

// Condition is how a bucket answers.
type Condition string

// The conditions of a bucket.
const (
	Unknown Condition = "unknown" // nobody has asked it yet
	Ready   Condition = "ready"
	Down    Condition = "down"    // it is not reached, or fails
	Missing Condition = "missing" // it does not exist
	Denied  Condition = "denied"  // it refuses the configured key
)

// ConditionOf returns what an error of a bucket says about it.
func ConditionOf(err error) Condition {
	switch {
	case err == nil:
		return Ready
	case errors.Is(err, ErrMissing):
		return Missing
	case errors.Is(err, ErrDenied):
		return Denied
	}
	return Down
}

// State is how one bucket answers, since when, and why not.
type State struct {
	Name      string
	Condition Condition
	Since     time.Time
	Err       error // nil unless it is down, missing or denied
}

const (
	probeTimeout  = 5 * time.Second
	probeFirst    = time.Second // between two probes of a bucket that is down; doubles
	probeMax      = 10 * time.Second
	probeInterval = 250 * time.Millisecond // how often Run looks whether a probe is due
)

// Monitor knows how the buckets of a set answer, so that one that is down costs a probe now and then and not a try of
// each object, and a line in the log for each change and not for each failure. Safe for concurrent use.
type Monitor struct {
	set   *Set
	key   string // of the probe: an object that need not be there
	log   *slog.Logger
	owed  func() int // what waits for the buckets
	onUp  func()     // a bucket is back
	mu    sync.Mutex // guards states
	state []*monitored
}

// monitored is one bucket as a Monitor knows it.
type monitored struct {
	State
	b       Bucket
	probing chan struct{} // closed when the probe under way is over; nil without one
	next    time.Time     // of the next probe while it is down
	pause   time.Duration // before that
}

// NewMonitor returns a monitor that has asked no bucket yet. It probes by looking for key. owed counts what waits to be
// written, for the log; onUp is called when a bucket is back.
func NewMonitor(set *Set, key string, log *slog.Logger, owed func() int, onUp func()) *Monitor {
	m := &Monitor{set: set, key: key, log: log, owed: owed, onUp: onUp}
	for i, name := range set.names {
		m.state = append(m.state, &monitored{State: State{Name: name, Condition: Unknown, Since: time.Now()}, b: set.buckets[i]})
	}
	return m
}

// Run asks all buckets at the start, and those that are down until they answer.
func (m *Monitor) Run(ctx context.Context) error {
	for _, s := range m.state {
		m.probe(ctx, s)
	}
	t := time.NewTicker(probeInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		for _, s := range m.state {
			if m.due(s) {
				m.probe(ctx, s)
			}
		}
	}
}

// Up reports whether a bucket may be used: nothing is known against it.
func (m *Monitor) Up(name string) bool {
	s := m.get(name)
	if s == nil {
		return true
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return s.Err == nil
}

// due reports whether a bucket is down and to be asked again.
func (m *Monitor) due(s *monitored) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return s.Err != nil && s.probing == nil && !time.Now().Before(s.next)
}

// Failed is told that the use of a bucket failed with err, and reports whether the bucket is down: then what failed is
// not to blame. It is found out by one probe, whoever asks.
func (m *Monitor) Failed(ctx context.Context, name string, err error) bool {
	if err == nil || !errors.Is(err, ErrUnavailable) || ctx.Err() != nil {
		return false
	}
	s := m.get(name)
	return s != nil && (!m.Up(name) || m.probe(ctx, s) != nil)
}

// Check is what readiness says of a bucket: it asks it now.
func (m *Monitor) Check(ctx context.Context, name string) error {
	if s := m.get(name); s != nil {
		return m.probe(ctx, s)
	}
	return nil
}

// States returns how all buckets answer, in the order of the configuration.
func (m *Monitor) States() []State {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]State, len(m.state))
	for i, s := range m.state {
		out[i] = s.State
	}
	return out
}

func (m *Monitor) get(name string) *monitored {
	for _, s := range m.state {
		if s.Name == name {
			return s
		}
	}
	return nil
}

// probe asks a bucket, or waits for who does, and returns why it can't be used.
func (m *Monitor) probe(ctx context.Context, s *monitored) error {
	m.mu.Lock()
	if wait := s.probing; wait != nil {
		m.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		return s.Err
	}
	done := make(chan struct{})
	s.probing = done
	m.mu.Unlock()
	limit, cancel := context.WithTimeout(ctx, probeTimeout)
	_, err := s.b.Stat(limit, m.key)
	cancel()
	if errors.Is(err, ErrNotFound) {
		err = nil
	}
	if ctx.Err() != nil && err != nil { // nothing is known
		m.mu.Lock()
		defer m.mu.Unlock()
		s.probing = nil
		close(done)
		return err
	}
	m.note(s, err, done)
	return err
}

// note takes down what a probe found, and tells of a change.
func (m *Monitor) note(s *monitored, err error, done chan struct{}) {
	now := ConditionOf(err)
	m.mu.Lock()
	was := s.Condition
	if was != now {
		s.Condition, s.Since = now, time.Now()
	}
	s.Err = err
	if err == nil {
		s.pause = 0
	} else {
		s.pause = min(max(probeFirst, 2*s.pause), probeMax)
		s.next = time.Now().Add(s.pause)
	}
	s.probing = nil
	close(done)
	m.mu.Unlock()
	if was != now {
		m.tell(s.Name, was, now, err)
	}
}

// tell writes the one line of a change.
func (m *Monitor) tell(name string, was, now Condition, err error) {
	owed := m.owed()
	switch now {
	case Ready:
		if was != Unknown {
			m.log.Info("the bucket is back: what it is owed is written", "bucket", name, "owed", owed)
			m.onUp()
		}
	case Missing:
		m.log.Error("the bucket does not exist: create it, or set its url in buckets right. Pushes go on, and all is owed to it until then", "bucket", name, "owed", owed, "error", err)
	case Denied:
		m.log.Error("the bucket denies access: set access_key and secret_key in buckets right, or give the key its rights. Pushes go on, and all is owed to it until then", "bucket", name, "owed", owed, "error", err)
	default:
		m.log.Warn("the bucket is down: pushes go on, and are written when it is back", "bucket", name, "owed", owed, "error", err)
	}
}
