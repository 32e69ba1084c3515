// Package audit writes down who changed what, and who was refused: one line of JSON each, to a file or to stdout.
package audit

import (
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"
)

// Event is one line of the audit: a change, or a refusal.
type Event struct {
	Time       time.Time `json:"time"`
	Event      string    `json:"event"` // one of the kinds below
	Subject    string    `json:"subject"`
	Source     string    `json:"source"`
	Method     string    `json:"method,omitempty"`
	Repository string    `json:"repository,omitempty"`
	Reference  string    `json:"reference,omitempty"` // tag or digest that the request names
	Tags       []string  `json:"tags,omitempty"`      // that a push by digest has set beside
	Digest     string    `json:"digest,omitempty"`    // of what was written
	Action     string    `json:"action,omitempty"`
	Status     int       `json:"status,omitempty"`
	Reason     string    `json:"reason,omitempty"`
	Outcome    string    `json:"outcome,omitempty"` // empty, or OutcomeUnknown
	// LeftOut is how many lines of this kind were not written since the last one, because there were too many.
	LeftOut   int    `json:"left_out,omitempty"`
	RequestID string `json:"request_id"`
	// ClientRequestID is what the client says that the request is called.
	ClientRequestID string `json:"client_request_id,omitempty"`
}

// The kinds of events.
const (
	Change      = "change"
	Refused     = "refused"
	LoginFailed = "login_failed"
)

// OutcomeUnknown is of a change that may have been made, or may be yet.
const OutcomeUnknown = "unknown"

// Log writes events, each as one line. A file that was moved away is begun anew. Of nil it writes none. It is safe for
// concurrent use.
type Log struct {
	name string // empty: nothing is written
	log  *slog.Logger

	mu  sync.Mutex
	out io.Writer // nil: none
	f   *os.File
}

// Open returns what writes to a file, to "stdout", or nowhere for an empty name. What can't be written is said in log.
func Open(name string, log *slog.Logger) (*Log, error) {
	a := &Log{name: name, log: log}
	switch name {
	case "":
		return a, nil
	case "stdout":
		a.out = os.Stdout
		return a, nil
	}
	return a, a.open()
}

// open opens the file. The caller holds mu, or is the only one that has a.
func (a *Log) open() error {
	f, err := os.OpenFile(a.name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if a.f != nil {
		_ = a.f.Close() // each line was written when it was
	}
	a.f, a.out = f, f
	return nil
}

// Write writes an event, with the time of now. What can't be written is said in the log, and stops nobody.
func (a *Log) Write(e Event) {
	if a == nil || a.name == "" {
		return
	}
	e.Time = time.Now().UTC()
	b, err := json.Marshal(e)
	if err != nil {
		a.log.Error("an event was not written to the audit", "error", err)
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.f != nil {
		now, nerr := os.Stat(a.name)
		open, oerr := a.f.Stat()
		if nerr != nil || oerr != nil || !os.SameFile(now, open) {
			err = a.open()
		}
	}
	_, werr := a.out.Write(append(b, '\n'))
	if err = errors.Join(err, werr); err != nil {
		a.log.Error("an event was not written to the audit", "error", err)
	}
}

// Close ends the use of the file.
func (a *Log) Close() error {
	if a == nil {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.f == nil {
		return nil
	}
	return a.f.Close()
}
