package transport

import "net/http"

// CloseAfterChunked is for listeners that clients reach, maybe through somebody's proxy: it ends a connection after a
// request whose body came in chunks. Such a request may have had a Content-Length, too, and whoever stands in front and
// goes by that sees the end of the body elsewhere, so that what follows would be taken for another request. RFC 9112
// section 6.1 lets a server refuse it or go by the chunks, and asks for the connection to be closed in either case.
//
// It is not refused because net/http drops the Content-Length beside chunks before any handler runs and leaves no trace
// of it. To see it, the bytes of each connection would have to be read a second time by a parser of our own that agrees
// with net/http on where every request begins, below TLS's conn, which net/http only knows unwrapped. Closing makes the
// difference harmless without one.
func CloseAfterChunked(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if len(r.TransferEncoding) > 0 {
			w.Header().Set("Connection", "close")
		}
		next.ServeHTTP(w, r)
	})
}
