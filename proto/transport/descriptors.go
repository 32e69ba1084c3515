package transport

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"time"
)

// A process whose file descriptors are used up can't open the files and connections that it needs for the bodies it is
// sending, and these end in the middle. So new work is refused while enough are left for what is under way.

// Descriptors tells how many file descriptors a process has left. It is safe for concurrent use.
type Descriptors struct {
	count func() (open, limit int) // limit 0: not known

	mu          sync.Mutex
	last        time.Time // of count
	open, limit int       // as it was counted
	taken       int       // by connections since
}

// countedFor is how long a count is believed: a request costs less than counting does.
const countedFor = 10 * time.Millisecond

// NewDescriptors returns the descriptors of this process.
func NewDescriptors() *Descriptors { return &Descriptors{count: countDescriptors} }

// countDescriptors looks at /proc/self/fd, whose size is the number of descriptors since Linux 6.2. Older ones, and
// other systems, say 0: then nothing is known.
func countDescriptors() (open, limit int) {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil || l.Cur > 1<<30 {
		return 0, 0
	}
	fi, err := os.Stat("/proc/self/fd")
	if err != nil || fi.Size() == 0 {
		return 0, 0
	}
	return int(fi.Size()), int(l.Cur)
}

// share returns what is left, from 0 to 1.
func (d *Descriptors) share() float64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	if time.Since(d.last) >= countedFor {
		d.open, d.limit = d.count()
		d.last, d.taken = time.Now(), 0
	}
	if d.limit <= 0 {
		return 1
	}
	return 1 - float64(d.open+d.taken)/float64(d.limit)
}

// take notes a connection that was accepted: a client may open more within countedFor than there is room for.
func (d *Descriptors) take() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.taken++
}

// Scarce reports whether less than a quarter is left: new work has to wait.
func (d *Descriptors) Scarce() bool { return d.share() < 1./4 }

// spent reports whether less than an eighth is left: not even a refusal can be afforded.
func (d *Descriptors) spent() bool { return d.share() < 1./8 }

// Check is what readiness says of it.
func (d *Descriptors) Check() error {
	if !d.Scarce() {
		return nil
	}
	open, limit := d.count()
	return fmt.Errorf("%d of %d file descriptors are open: new requests are refused; raise the limit (LimitNOFILE, ulimit -n)", open, limit)
}

// refuseScarce answers 503 while descriptors are scarce, and ends the connection, which is one. Probes are answered.
func (d *Descriptors) refuseScarce(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !d.Scarce() || r.URL.Path == "/health" || r.URL.Path == "/readiness" {
			next.ServeHTTP(w, r)
			return
		}
		w.Header().Set("Connection", "close")
		w.Header().Set("Retry-After", "1")
		refuse(w, http.StatusServiceUnavailable, "too many connections and files are open: try again")
	})
}

// thrifty is a listener that hangs up while descriptors are spent. Its connections are the listener's own.
type thrifty struct {
	net.Listener
	d *Descriptors
}

// Accept implements net.Listener.
func (l thrifty) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		l.d.take()
		if !l.d.spent() {
			return c, nil
		}
		_ = c.Close() // nobody is told
	}
}
