package transport

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// lookEvery is how often files are looked at, at most.
type lookEvery time.Duration

// period returns the time between two looks: a second, where it is not set.
func (e lookEvery) period() time.Duration {
	if e == 0 {
		return time.Second
	}
	return time.Duration(e)
}

// reloaded is what files say, read again when they change. It is safe for concurrent use.
type reloaded[T any] struct {
	files []string
	parse func(files [][]byte) (T, error)
	every lookEvery
	log   *slog.Logger

	mu      sync.Mutex
	current T
	stamps  []os.FileInfo // of what was read last
	failed  bool          // it was not usable: it is read again although the files are the same
	checked time.Time
}

// newReloaded reads the files once; what they say must be usable then.
func newReloaded[T any](log *slog.Logger, every lookEvery, parse func([][]byte) (T, error), files ...string) (*reloaded[T], error) {
	r := &reloaded[T]{files: files, parse: parse, every: every, log: log, checked: time.Now(), stamps: stampsOf(files)}
	var err error
	r.current, err = r.read()
	return r, err
}

// stampsOf tells one content of files from the next; nil is a file that can't be looked at.
func stampsOf(files []string) []os.FileInfo {
	out := make([]os.FileInfo, len(files))
	for i, f := range files {
		if fi, err := os.Stat(f); err == nil {
			out[i] = fi
		}
	}
	return out
}

// sameStamp also tells a file from one that took its name, whatever time and size that has.
func sameStamp(a, b os.FileInfo) bool {
	if a == nil || b == nil {
		return a == b
	}
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

func (r *reloaded[T]) read() (v T, err error) {
	content := make([][]byte, len(r.files))
	for i, f := range r.files {
		if content[i], err = os.ReadFile(f); err != nil {
			return v, fmt.Errorf("tls: %w", err)
		}
	}
	if v, err = r.parse(content); err != nil {
		return v, fmt.Errorf("tls: %s: %w", strings.Join(r.files, ", "), err)
	}
	return v, nil
}

// get returns what the files say. It looks at them at most once in a period. While what they say is not usable, because
// it is half written say, the old value stays, and they are read again each time: what kept them from being read may be
// no change of theirs.
func (r *reloaded[T]) get() (T, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if now.Sub(r.checked) < r.every.period() {
		return r.current, nil
	}
	r.checked = now
	stamps := stampsOf(r.files)
	same := slices.EqualFunc(stamps, r.stamps, sameStamp)
	if same && !r.failed {
		return r.current, nil
	}
	r.stamps = stamps
	v, err := r.read()
	r.failed = err != nil
	switch {
	case err == nil:
		r.current = v
	case !same: // once for each change
		r.log.Warn("changed TLS files are not usable, what was read before stays", "error", err)
	}
	return r.current, nil
}

// newPair returns a certificate and key on disk.
func newPair(cert, key string, every lookEvery, log *slog.Logger) (*reloaded[*tls.Certificate], error) {
	if cert == "" || key == "" {
		return nil, errors.New("tls: cert and key are needed together")
	}
	return newReloaded(log, every, func(f [][]byte) (*tls.Certificate, error) {
		c, err := tls.X509KeyPair(f[0], f[1])
		return &c, err
	}, cert, key)
}

// newPool returns an authority on disk.
func newPool(file string, every lookEvery, log *slog.Logger) (*reloaded[*x509.CertPool], error) {
	return newReloaded(log, every, func(f [][]byte) (*x509.CertPool, error) {
		p := x509.NewCertPool()
		if !p.AppendCertsFromPEM(f[0]) {
			return nil, errors.New("no certificate in PEM form is in it")
		}
		return p, nil
	}, file)
}

// parseSerials reads hexadecimal numbers, one a line, as openssl x509 -serial prints them: colons and "serial=" are
// passed over, and what follows a #.
func parseSerials(files [][]byte) (map[string]bool, error) {
	out := map[string]bool{}
	n := 0
	for line := range bytes.Lines(files[0]) {
		n++
		text, _, _ := strings.Cut(string(line), "#")
		text = strings.ReplaceAll(strings.TrimPrefix(strings.TrimSpace(text), "serial="), ":", "")
		if text == "" {
			continue
		}
		v, ok := new(big.Int).SetString(text, 16)
		if !ok {
			return nil, fmt.Errorf("line %d: %.60q is no hexadecimal number", n, text)
		}
		out[v.Text(16)] = true
	}
	return out, nil
}
