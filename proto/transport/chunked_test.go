package transport

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
)

// What follows a body whose end is said twice is never taken for another request.
func TestNothingIsSmuggledBehindABody(t *testing.T) {
	var served atomic.Int32
	srv := httptest.NewServer(CloseAfterChunked(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		served.Add(1)
		io.Copy(io.Discard, r.Body)
	})))
	defer srv.Close()
	c, err := net.Dial("tcp", strings.TrimPrefix(srv.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const smuggled = "DELETE /v2/victim/manifests/v1 HTTP/1.1\r\nHost: x\r\n\r\n"
	const request = "POST /v2/a/blobs/uploads/ HTTP/1.1\r\nHost: x\r\nContent-Length: 200\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
	if _, err := io.WriteString(c, request+smuggled); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(c) // to its end: the connection is closed
	if n := served.Load(); n != 1 || strings.Count(string(b), "HTTP/1.1 ") != 1 {
		t.Errorf("%d requests were served, %v: %s", n, err, b)
	}
}
