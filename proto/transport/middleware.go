package transport

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/config"
)

// stallTimeout is how long a client may take no byte, or send none, before its connection is cut; and the time over
// which the least rate of a request is averaged.
const stallTimeout = time.Minute

// chunk is how much goes to sendfile before the deadline is moved on: a client is cut below 4 KiB a second, not above.
const chunk = 256 << 10

// Middleware counts requests, moves deadlines while bytes move, and keeps a panic from ending the process. It keeps
// sendfile.
func Middleware(role string, log *slog.Logger, reg prometheus.Registerer) func(http.Handler) http.Handler {
	labels := prometheus.Labels{"role": role}
	requests := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "kraken_http_requests_total", Help: "Requests by method and status.", ConstLabels: labels,
	}, []string{"method", "status"})
	seconds := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "kraken_http_request_seconds", Help: "Time until a request was done, its body included.", ConstLabels: labels,
		Buckets: prometheus.ExponentialBuckets(0.0005, 4, 10),
	}, []string{"method"})
	sent := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "kraken_http_sent_bytes_total", Help: "Bytes of response bodies.", ConstLabels: labels,
	})
	reg.MustRegister(requests, seconds, sent)
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			began := time.Now()
			w := &writer{ResponseWriter: rw, rc: http.NewResponseController(rw)}
			if r.Body != nil && r.Body != http.NoBody {
				b := newRequestBody(r, w)
				r.Body = b
				if r.ProtoMajor == 1 { // later ones end a stream without the connection
					w.body = b
				}
			}
			defer func() {
				method := r.Method
				if !knownMethods[method] {
					method = "other"
				}
				seconds.WithLabelValues(method).Observe(time.Since(began).Seconds())
				sent.Add(float64(w.n))
				v := recover()
				if v != nil && v != http.ErrAbortHandler {
					log.Error("a request made the handler panic", "method", r.Method, "path", r.URL.Path, "panic", v, "stack", string(debug.Stack()))
					if w.status == 0 {
						http.Error(w, `{"errors":[{"code":"UNKNOWN","message":"internal error"}]}`, http.StatusInternalServerError)
					}
					v = http.ErrAbortHandler
				}
				requests.WithLabelValues(method, strconv.Itoa(max(w.status, 0))).Inc()
				log.Debug("request", "method", r.Method, "path", r.URL.Path, "status", w.status, "bytes", w.n, "seconds", time.Since(began).Seconds(), "remote", r.RemoteAddr)
				if v != nil {
					panic(v) // net/http resets the connection, so that the client can't take what it has for the whole
				}
			}()
			next.ServeHTTP(w, r)
			if w.lingers && w.body.unread() {
				w.linger(w.body)
			}
		})
	}
}

var knownMethods = map[string]bool{"GET": true, "HEAD": true, "POST": true, "PUT": true, "PATCH": true, "DELETE": true, "OPTIONS": true}

// DefaultLeastRate is ServerConfig.LeastRate where none is set, in bytes a second.
const DefaultLeastRate = 1 << 10

// ErrTooSlow is a request whose body came too slowly; its answer is 408.
var ErrTooSlow = errors.New("the request's body comes too slowly")

type leastRate struct{}

// requestBody lets a client send as slowly as the least rate, averaged over stallTimeout. Only the time in which it is
// waited for counts: what the handler does between two reads is its own time.
type requestBody struct {
	io.ReadCloser
	w        *writer
	perByte  time.Duration
	patience time.Duration // how long may be waited now; what comes adds to it, up to stallTimeout
	length   int64         // as announced, -1 for unknown
	read     atomic.Int64
	ended    atomic.Bool // well or not
}

func newRequestBody(r *http.Request, w *writer) *requestBody {
	rate, ok := r.Context().Value(leastRate{}).(config.Rate)
	if !ok || rate <= 0 {
		rate = DefaultLeastRate
	}
	perByte := time.Second / time.Duration(min(rate, config.Rate(time.Second)))
	return &requestBody{ReadCloser: r.Body, w: w, perByte: perByte, patience: stallTimeout, length: r.ContentLength}
}

func (b *requestBody) Read(p []byte) (int, error) {
	began := time.Now()
	// Connections without deadlines (tests with recorders) go without.
	_ = b.w.rc.SetReadDeadline(began.Add(b.patience))
	n, err := b.ReadCloser.Read(p)
	b.patience = min(b.patience-time.Since(began)+time.Duration(n)*b.perByte, stallTimeout)
	b.read.Add(int64(n))
	if err != nil {
		b.ended.Store(true)
		_ = b.w.rc.SetReadDeadline(time.Time{}) // the handler may take its time with what it has
		if errors.Is(err, os.ErrDeadlineExceeded) {
			b.w.tooSlow = true
			err = fmt.Errorf("%w: %w", ErrTooSlow, err)
		}
	}
	return n, err
}

// writer allows each write a time, and hands files on to sendfile.
type writer struct {
	http.ResponseWriter
	rc     *http.ResponseController
	status int
	n      int64
	// tooSlow is whether the request was cut for its slowness, so that an error is 408 whatever the handler makes of
	// it.
	tooSlow bool
	body    *requestBody // nil without one
	lingers bool         // the answer went out before the body was read
}

// buffers are for copying bodies: large, because each read and write of a socket costs a system call and a deadline.
var buffers = sync.Pool{New: func() any { b := make([]byte, 256<<10); return &b }}

// Unwrap is for http.ResponseController.
func (w *writer) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader notes the status.
func (w *writer) WriteHeader(status int) {
	if w.tooSlow && status >= http.StatusBadRequest {
		status = http.StatusRequestTimeout
		w.Header().Set("Connection", "close")
	}
	if w.status == 0 && status >= 200 {
		w.status = status
		if w.body.unread() {
			w.lingers = true
			w.Header().Set("Connection", "close")
		}
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *writer) extend() {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	_ = w.rc.SetWriteDeadline(time.Now().Add(stallTimeout)) // a recorder in a test has none
}

func (w *writer) Write(b []byte) (int, error) {
	w.extend()
	n, err := w.ResponseWriter.Write(b)
	w.n += int64(n)
	return n, err
}

// ReadFrom keeps sendfile for files. Anything else is copied piece by piece: reading it may block for longer than the
// client may.
func (w *writer) ReadFrom(src io.Reader) (n int64, err error) {
	rf, ok := w.ResponseWriter.(io.ReaderFrom)
	lr, limited := src.(*io.LimitedReader)
	if limited {
		_, isFile := lr.R.(*os.File)
		ok = ok && isFile
	}
	if !ok || !limited {
		buf := buffers.Get().(*[]byte)
		defer buffers.Put(buf)
		return io.CopyBuffer(struct{ io.Writer }{w}, src, *buf)
	}
	for lr.N > 0 {
		w.extend()
		part := &io.LimitedReader{R: lr.R, N: min(lr.N, chunk)}
		want := part.N
		k, err := rf.ReadFrom(part)
		n += k
		w.n += k
		lr.N -= k
		if err != nil || k < want {
			return n, err
		}
	}
	return n, nil
}
