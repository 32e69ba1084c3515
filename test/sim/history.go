package sim

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"
)

// history is what happened in a run, with virtual times.
type history struct {
	began time.Time

	mu    sync.Mutex
	lines []string
	wrong []Violation
}

// Violation is something that must not be.
type Violation struct {
	Kind string // lost, wrong, back, stale, debt, stuck, short, start
	Text string
	At   time.Duration // virtual, since the start
}

func (v Violation) String() string { return fmt.Sprintf("%s %s: %s", stamp(v.At), v.Kind, v.Text) }

func stamp(d time.Duration) string { return fmt.Sprintf("%10.4f", d.Seconds()) }

func (h *history) note(format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lines = append(h.lines, stamp(time.Since(h.began))+"  "+fmt.Sprintf(format, args...))
}

func (h *history) violate(kind, format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := Violation{kind, fmt.Sprintf(format, args...), time.Since(h.began)}
	for _, w := range h.wrong {
		if w.Kind == v.Kind && w.Text == v.Text {
			return
		}
	}
	h.wrong = append(h.wrong, v)
	h.lines = append(h.lines, stamp(v.At)+"  VIOLATION "+v.Kind+": "+v.Text)
}

func (h *history) violations() []Violation {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]Violation(nil), h.wrong...)
}

// String is the whole history, a line an event.
func (h *history) String() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return strings.Join(h.lines, "\n")
}

// logs puts what a role logs into the history.
type logs struct {
	h     *history
	node  string
	level slog.Level
	attrs []slog.Attr
}

func (l logs) Enabled(_ context.Context, level slog.Level) bool { return level >= l.level }

func (l logs) WithAttrs(as []slog.Attr) slog.Handler {
	l.attrs = append(append([]slog.Attr(nil), l.attrs...), as...)
	return l
}

func (l logs) WithGroup(string) slog.Handler { return l }

func (l logs) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	fmt.Fprintf(&b, "        %s: %s", l.node, r.Message)
	for _, a := range l.attrs {
		fmt.Fprintf(&b, " %s=%v", a.Key, a.Value)
	}
	r.Attrs(func(a slog.Attr) bool {
		fmt.Fprintf(&b, " %s=%v", a.Key, a.Value)
		return true
	})
	l.h.note("%s", b.String())
	return nil
}
