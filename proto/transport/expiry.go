package transport

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// CertificateWarning is how long before its end a certificate is warned of, or a quarter of its life where that is
// less: ones that are renewed each day live no two weeks.
const CertificateWarning = 14 * 24 * time.Hour

const (
	expiryEvery     = time.Minute    // between two looks at the files
	expirySaidEvery = 12 * time.Hour // between two warnings of one file
)

// Expiry watches files of certificates: a metric says until when each is valid, and a warning comes in time.
type Expiry struct {
	log   *slog.Logger
	until *prometheus.GaugeVec

	mu    sync.Mutex
	files []string
	ends  map[string]span      // as found by the last look
	said  map[string]time.Time // when it was warned of last
}

// NewExpiry watches nothing yet.
func NewExpiry(log *slog.Logger, reg prometheus.Registerer) *Expiry {
	e := &Expiry{log: log, ends: map[string]span{}, said: map[string]time.Time{}}
	e.until = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "kraken_certificate_not_after_seconds", Help: "Until when the certificates of a file are valid, the first to end; seconds since 1970.",
	}, []string{"file"})
	reg.MustRegister(e.until)
	return e
}

// Watch adds files, empty names apart, and looks at them now.
func (e *Expiry) Watch(files ...string) {
	e.mu.Lock()
	for _, f := range files {
		if _, known := e.ends[f]; f != "" && !known {
			e.files = append(e.files, f)
			e.ends[f] = span{}
		}
	}
	e.mu.Unlock()
	e.look(time.Now())
}

// Run looks at the files until ctx is done.
func (e *Expiry) Run(ctx context.Context) error {
	t := time.NewTicker(expiryEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			e.look(time.Now())
		}
	}
}

// Check returns an error, for readiness, while a certificate has expired or is about to.
func (e *Expiry) Check(context.Context) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, f := range e.files {
		if text := e.ends[f].ending(time.Now()); text != "" {
			return fmt.Errorf("%s %s", f, text)
		}
	}
	return nil
}

// span is the time of a certificate.
type span struct{ begin, end time.Time }

// ending says of a certificate's end what an operator must know, nothing while there is time.
func (s span) ending(now time.Time) string {
	switch left := s.end.Sub(now); {
	case s.end.IsZero() || left > min(CertificateWarning, s.end.Sub(s.begin)/4):
		return ""
	case left <= 0:
		return "has expired: others refuse it"
	default:
		return fmt.Sprintf("expires in %s, at %s", left.Round(time.Minute), s.end.UTC().Format(time.RFC3339))
	}
}

func (e *Expiry) look(now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, f := range e.files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // who uses it says so, and keeps the old one
		}
		var s span
		for _, c := range certificatesOf(b) {
			if s.end.IsZero() || c.NotAfter.Before(s.end) {
				s = span{c.NotBefore, c.NotAfter}
			}
		}
		e.ends[f] = s
		e.until.WithLabelValues(f).Set(float64(s.end.Unix()))
		text := s.ending(now)
		if text == "" {
			delete(e.said, f)
			continue
		}
		if last, said := e.said[f]; !said || now.Sub(last) >= expirySaidEvery {
			e.said[f] = now
			e.log.Warn("certificate "+text, "file", f)
		}
	}
}
