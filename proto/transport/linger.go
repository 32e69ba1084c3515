package transport

import (
	"context"
	"io"
	"net/http"
	"time"
)

// An answer that comes before its request's body was read is lost when the connection is closed at once: what the
// client still sends makes the kernel reset the connection, and the client, or a load balancer between, sees that in
// the place of the answer. So what follows is read and thrown away, so many bytes and so long.
const (
	lingerBytes = 16 << 20
	lingerTime  = 5 * time.Second
)

// keptBody is how many bytes of a body net/http reads by itself to keep a connection.
const keptBody = 256 << 10

// graceTime is how long a request goes on after its client has shut its sending half.
const graceTime = 10 * time.Second

// unread reports whether there may be more of the body than net/http takes care of.
func (b *requestBody) unread() bool {
	return b != nil && !b.ended.Load() && (b.length < 0 || b.length-b.read.Load() > keptBody)
}

// linger sends the answer and reads on.
func (w *writer) linger(b *requestBody) {
	if w.rc.Flush() != nil || w.rc.SetReadDeadline(time.Now().Add(lingerTime)) != nil {
		return
	}
	_, _ = io.CopyN(io.Discard, b.ReadCloser, lingerBytes) // an end of any kind is one
}

// AnswerHalfClosed lets a request go on for ten seconds after its client has shut its sending half, which net/http
// takes for gone. Whether it has gone altogether can't be told before it is written to, so this is for requests that
// cost little when nobody waits for them any more.
func AnswerHalfClosed(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithCancelCause(context.WithoutCancel(r.Context()))
		stop := context.AfterFunc(r.Context(), func() {
			t := time.NewTimer(graceTime)
			defer t.Stop()
			select {
			case <-t.C:
				cancel(context.Cause(r.Context()))
			case <-ctx.Done():
			}
		})
		defer cancel(nil)
		defer stop()
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}
