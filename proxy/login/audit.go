package login

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
	Event      string    `json:"event"` // change, refused or login
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
	Outcome    string    `json:"outcome,omitempty"` // unknown: it may have been done, or may be yet
	RequestID  string    `json:"request_id"`
	// ClientRequestID is what the client says that the request is called.
	ClientRequestID string `json:"client_request_id,omitempty"`
}

// The kinds of events.
const (
	eventChange  = "change"
	eventRefused = "refused"
	eventLogin   = "login_failed"
)

const outcomeUnknown = "unknown"

// audit writes events, each as one line. A file that was moved away is begun anew.
type audit struct {
	name string
	log  *slog.Logger

	mu  sync.Mutex
	out io.Writer // nil: none
	f   *os.File
}

func openAudit(name string, log *slog.Logger) (*audit, error) {
	a := &audit{name: name, log: log}
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
func (a *audit) open() error {
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

// write writes an event. What can't be written is said in the log, and stops nobody.
func (a *audit) write(e Event) {
	if a == nil || a.out == nil {
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

func (a *audit) close() error {
	if a.f == nil {
		return nil
	}
	return a.f.Close()
}
