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

func is503(resp *http.Response) bool { return resp.StatusCode == http.StatusServiceUnavailable }

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
			hc := Patient(restarting(c.away, c.err, &got), 5*time.Second, is503)
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
		if _, err := Patient(restarting(time.Minute, errRefused, &got), 5*time.Second, is503).Do(req); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
	})
}

// answers is another role that answers each path as its function says, with the header that it fills.
type answers map[string]func(h http.Header) (status int, err error)

func (a answers) RoundTrip(r *http.Request) (*http.Response, error) {
	h := http.Header{}
	status, err := a[r.URL.Path](h)
	if err != nil {
		return nil, err
	}
	return &http.Response{StatusCode: status, Header: h, Body: http.NoBody}, nil
}

// askIt makes a request of a patient client, and returns the status, 0 for an error, and how long it took.
func askIt(t *testing.T, hc *http.Client, path string) (status int, took time.Duration) {
	t.Helper()
	began := time.Now()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://x"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := hc.Do(req)
	if err != nil {
		return 0, time.Since(began)
	}
	resp.Body.Close()
	return resp.StatusCode, time.Since(began)
}

// A 503 that does not say that the other side is away is the caller's at once, and one that does is asked again no
// sooner than it says, whatever others are answered meanwhile.
func TestPatienceIsForAbsenceAlone(t *testing.T) {
	const patience = 5 * time.Second
	for name, c := range map[string]struct {
		away, after string
		asked       int
		took        time.Duration
	}{
		"not away":          {"false", "1", 1, 0},
		"away":              {"true", "1", 6, patience},
		"away for longer":   {"true", "3", 3, patience + time.Second},
		"away for too long": {"true", "60", 1, 0},
	} {
		synctest.Test(t, func(t *testing.T) {
			asked := 0
			hc := Patient(&http.Client{Transport: answers{
				"/refused": func(h http.Header) (int, error) {
					asked++
					h.Set("Away", c.away)
					h.Set("Retry-After", c.after)
					return http.StatusServiceUnavailable, nil
				},
				"/fine": func(http.Header) (int, error) { return http.StatusOK, nil },
			}}, patience, func(resp *http.Response) bool { return resp.Header.Get("Away") == "true" })
			ended := make(chan struct{})
			defer close(ended)
			go func() { // others, who get their answers
				for {
					select {
					case <-time.After(50 * time.Millisecond):
						_, _ = askIt(t, hc, "/fine")
					case <-ended:
						return
					}
				}
			}()
			if status, took := askIt(t, hc, "/refused"); status != http.StatusServiceUnavailable || asked != c.asked || took != c.took {
				t.Errorf("%s: asked %d times, %d after %s; want %d times and %s", name, asked, status, took, c.asked, c.took)
			}
		})
	}
}

// How an absence began that was heard of long ago says nothing of one that is heard of now.
func TestPatienceBeginsAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const patience = 5 * time.Second
		var until time.Time // it is back
		hc := Patient(&http.Client{Transport: answers{"/": func(http.Header) (int, error) {
			if time.Now().Before(until) {
				return 0, errRefused
			}
			return http.StatusOK, nil
		}}}, patience, is503)
		until = time.Now().Add(time.Minute)
		if status, took := askIt(t, hc, "/"); status != 0 || took != patience {
			t.Errorf("away for too long: %d after %s", status, took)
		}
		if status, took := askIt(t, hc, "/"); status != 0 || took != 0 {
			t.Errorf("still away: %d after %s", status, took)
		}
		time.Sleep(time.Hour) // nobody asks
		until = time.Now().Add(2 * time.Second)
		if status, took := askIt(t, hc, "/"); status != http.StatusOK || took < 2*time.Second {
			t.Errorf("away for a moment after an hour: %d after %s", status, took)
		}
	})
}

// The time that an answer took is no time of the other side's absence.
func TestPatienceAfterALongRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		hc := Patient(&http.Client{Transport: answers{"/": func(http.Header) (int, error) {
			if asked++; asked == 1 {
				time.Sleep(20 * time.Second)
				return 0, errReset
			}
			return http.StatusOK, nil
		}}}, 5*time.Second, is503)
		if status, _ := askIt(t, hc, "/"); status != http.StatusOK {
			t.Errorf("answered %d", status)
		}
	})
}
