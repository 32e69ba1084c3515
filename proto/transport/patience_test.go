package transport

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

var (
	errRefused = &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
	errReset   = &net.OpError{Op: "read", Err: syscall.ECONNRESET}
)

// restarting answers err, or 503 where there is none, until it has been away for so long.
func restarting(away time.Duration, err error, got *[]string) *http.Client {
	began := time.Now()
	return &http.Client{Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
		body := ""
		if r.Body != nil {
			b, _ := io.ReadAll(r.Body)
			body = string(b)
		}
		*got = append(*got, body)
		status := http.StatusOK
		if time.Since(began) < away {
			if err != nil {
				return nil, err
			}
			status = http.StatusServiceUnavailable
		}
		return &http.Response{StatusCode: status, Body: io.NopCloser(strings.NewReader(""))}, nil
	})}
}

func TestPatience(t *testing.T) {
	for name, c := range map[string]struct {
		method string
		away   time.Duration
		err    error
		match  string
		want   int // status, 0: the error
		waits  bool
	}{
		"refused":                 {"POST", 3 * time.Second, errRefused, "", 200, true},
		"503":                     {"DELETE", 3 * time.Second, nil, "", 200, true},
		"reset":                   {"PUT", 3 * time.Second, errReset, "", 200, true},
		"away for too long":       {"PUT", time.Minute, errRefused, "", 0, true},
		"503 for too long":        {"GET", time.Minute, nil, "", 503, true},
		"may have been done":      {"POST", 3 * time.Second, errReset, "", 0, false},
		"may have been done once": {"PUT", 3 * time.Second, errReset, "*", 0, false},
		"another error":           {"GET", 3 * time.Second, errors.New("no such certificate"), "", 0, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			var got []string
			hc := Patient(restarting(c.away, c.err, &got), 5*time.Second)
			ask := func() (status int, took time.Duration) {
				began := time.Now()
				req, err := http.NewRequestWithContext(t.Context(), c.method, "http://x/", strings.NewReader("body"))
				if err != nil {
					t.Fatal(err)
				}
				if c.match != "" {
					req.Header.Set("If-Match", c.match)
				}
				resp, err := hc.Do(req)
				if err != nil {
					if !errors.Is(err, c.err) {
						t.Errorf("%s: %v", name, err)
					}
					return 0, time.Since(began)
				}
				resp.Body.Close()
				return resp.StatusCode, time.Since(began)
			}
			status, took := ask()
			if status != c.want || took > 5*time.Second || (took > time.Second) != c.waits {
				t.Errorf("%s: status %d after %v", name, status, took)
			}
			for _, b := range got {
				if b != "body" {
					t.Errorf("%s: the body came as %q", name, b)
				}
			}
			if c.want == 200 || !c.waits {
				return
			}
			time.Sleep(time.Second)
			if status, took := ask(); status != c.want || took > 0 {
				t.Errorf("%s: while it stays away: %d after %v", name, status, took)
			}
		})
	}
}

func TestPatienceEndsWithItsCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got []string
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://x/", nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Patient(restarting(time.Minute, errRefused, &got), 5*time.Second).Do(req); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
	})
}
