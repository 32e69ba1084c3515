package proxy

import (
	"fmt"
	"math"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"

	"kraken/proto/registry"

	"kraken/proto/transport"
)

// inFlight counts the upload requests that are being served, in all and by source: each holds buffers and a connection
// to every replica.
type inFlight struct {
	total, perSource int

	mu      sync.Mutex
	now     int
	sources map[string]int
}

func newInFlight(total, perSource int) *inFlight {
	return &inFlight{total: total, perSource: perSource, sources: map[string]int{}}
}

// enter counts a request until leave is called; an error, of too many requests, when there are as many as there may be.
func (f *inFlight) enter(source string) (leave func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := f.sources[source]; n >= f.perSource {
		return nil, tooMany(fmt.Sprintf("%d uploads from %s are under way", n, source))
	}
	if f.now >= f.total {
		return nil, tooMany(fmt.Sprintf("%d uploads are under way", f.now))
	}
	f.now++
	f.sources[source]++
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.now--
		if f.sources[source]--; f.sources[source] == 0 {
			delete(f.sources, source)
		}
	}, nil
}

func tooMany(why string) error {
	return &registry.RetryError{Err: fmt.Errorf("%w: %s", registry.ErrTooManyRequests, why), After: time.Second}
}

// uploads refuses upload requests beyond the bounds.
func (f *inFlight) uploads(m *metrics, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		writes := r.Method == http.MethodPost || r.Method == http.MethodPatch || r.Method == http.MethodPut
		if writes && strings.Contains(r.URL.Path, "/blobs/uploads") {
			leave, err := f.enter(transport.SourceOf(r.RemoteAddr))
			if err != nil {
				m.refused.Inc()
				registry.WriteError(w, r, err)
				return
			}
			defer leave()
		}
		next.ServeHTTP(w, r)
	})
}

// mostUploads is how many uploads may be under way where nothing is configured: half of the process's descriptors, each
// upload taking one and one for every replica, at most 2,048.
func mostUploads(replicas int) int {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		l.Cur = 1024
	}
	return max(16, min(2048, int(min(l.Cur, math.MaxInt32))/(2*(1+replicas))))
}
