package abuse

import (
	"bytes"
	"fmt"
	"testing"
	"time"
)

// TestSmuggledRequests: a request says the end of its body twice, by a length and by chunks. What follows it on the
// connection is never answered, so nobody who shares a connection through a proxy in front can slip a request under
// another's name.
func TestSmuggledRequests(t *testing.T) {
	c := shared(t)
	for _, door := range []*process{c.Proxy, c.Agents[0]} {
		for _, method := range []string{"GET", "PUT", "POST"} {
			for _, headers := range []string{"Content-Length: 80\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nContent-Length: 80", "Content-Length: 5\r\nTransfer-Encoding: Chunked"} {
				send := fmt.Appendf(nil, "%s /v2/mine/manifests/v1 HTTP/1.1\r\nHost: %s\r\n%s\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: %s\r\n\r\n", method, door.Addr, headers, door.Addr)
				got, closed := raw(t, door.Addr, nil, 5*time.Second, false, send)
				if n := bytes.Count(got, []byte("HTTP/1.1 ")); n != 1 || !closed {
					t.Errorf("%s: %s with %q: %d answers, closed: %v: %.300q", door.Name, method, headers, n, closed, got)
				}
			}
		}
	}
}
