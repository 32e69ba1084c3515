package transport

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kraken/test/pipes"
)

// fileSink is a ResponseWriter that knows sendfile, and notes what it was given for it.
type fileSink struct {
	*httptest.ResponseRecorder
	files  int
	copied int
}

func (s *fileSink) ReadFrom(src io.Reader) (int64, error) {
	if lr, ok := src.(*io.LimitedReader); ok {
		if _, ok := lr.R.(*os.File); ok {
			s.files++
		}
	}
	return io.Copy(s.Body, src)
}

func (s *fileSink) Write(b []byte) (int, error) {
	s.copied += len(b)
	return s.ResponseRecorder.Write(b)
}

func TestFilesReachSendfile(t *testing.T) {
	content := bytes.Repeat([]byte("kraken!!"), (2*chunk+chunk/2)/8)
	name := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, rng string
		want      []byte
		files     int
	}{
		{"whole", "", content, 3},
		{"range", "bytes=8-15", content[8:16], 1},
		{"range over a chunk", fmt.Sprintf("bytes=1-%d", chunk+1), content[1 : chunk+2], 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := Middleware("test", quiet(), prometheus.NewRegistry())(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				f, err := os.Open(name)
				if err != nil {
					t.Error(err)
					return
				}
				defer f.Close()
				http.ServeContent(w, r, "", time.Time{}, f)
			}))
			r := httptest.NewRequest(http.MethodGet, "/", nil)
			r.Header.Set("Content-Type", "application/octet-stream")
			if tc.rng != "" {
				r.Header.Set("Range", tc.rng)
			}
			w := &fileSink{ResponseRecorder: httptest.NewRecorder()}
			w.Header().Set("Content-Type", "application/octet-stream")
			h.ServeHTTP(w, r)
			if w.files != tc.files || w.copied != 0 {
				t.Errorf("%d pieces went as files and %d bytes were copied, want %d pieces", w.files, w.copied, tc.files)
			}
			if !bytes.Equal(w.Body.Bytes(), tc.want) {
				t.Errorf("got %d bytes, want %d", w.Body.Len(), len(tc.want))
			}
		})
	}
}

func TestWhatIsNoFileIsCopied(t *testing.T) {
	text := strings.Repeat("x", 200<<10)
	for name, src := range map[string]io.Reader{
		"reader":         io.MultiReader(strings.NewReader(text)),
		"limited reader": &io.LimitedReader{R: strings.NewReader(text), N: int64(len(text))},
	} {
		under := &fileSink{ResponseRecorder: httptest.NewRecorder()}
		w := &writer{ResponseWriter: under, rc: http.NewResponseController(under)}
		n, err := w.ReadFrom(src)
		if err != nil || n != int64(len(text)) || under.copied != len(text) || under.files != 0 || under.Body.String() != text {
			t.Errorf("%s: %d bytes, %v, %d copied, %d as files", name, n, err, under.copied, under.files)
		}
		if w.n != int64(len(text)) {
			t.Errorf("%s: counted %d bytes", name, w.n)
		}
	}
}

func TestPanics(t *testing.T) {
	t.Run("before anything was sent", func(t *testing.T) {
		h := Middleware("test", quiet(), prometheus.NewRegistry())(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("boom") }))
		w := httptest.NewRecorder()
		func() {
			defer func() {
				if v := recover(); v != http.ErrAbortHandler {
					t.Errorf("the middleware panicked with %v", v)
				}
			}()
			h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
		}()
		if w.Code != http.StatusInternalServerError || !strings.Contains(w.Body.String(), `"errors"`) || strings.Contains(w.Body.String(), "boom") {
			t.Errorf("answer %d %q", w.Code, w.Body)
		}
	})
	t.Run("midway", func(t *testing.T) {
		h := Middleware("test", quiet(), prometheus.NewRegistry())(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, "half")
			_ = http.NewResponseController(w).Flush()
			panic("boom")
		}))
		srv := httptest.NewServer(h)
		defer srv.Close()
		resp, err := srv.Client().Get(srv.URL)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if b, err := io.ReadAll(resp.Body); err == nil {
			t.Errorf("half an answer ended cleanly: %q", b)
		}
	})
}

// TestStalledClients: a client that sends or takes nothing is cut off after stallTimeout, one that is merely slow is
// not.
func TestStalledClients(t *testing.T) {
	t.Run("slow upload goes on", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			got := make(chan string, 1)
			p := pipes.Serve(t, Middleware("test", quiet(), prometheus.NewRegistry())(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				b, err := io.ReadAll(r.Body)
				if err != nil {
					t.Error(err)
				}
				got <- string(b)
				w.WriteHeader(http.StatusAccepted)
			})))
			c, err := p.Dial()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			send(t, c, fmt.Sprintf("PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", 5*20*DefaultLeastRate))
			text := strings.Repeat("slow!", DefaultLeastRate*20)
			for part := range slices.Chunk([]byte(text), DefaultLeastRate*50) {
				time.Sleep(50*time.Second - 1) // the bubble's clock
				send(t, c, string(part))
			}
			if s := <-got; s != text {
				t.Errorf("read %d bytes", len(s))
			}
			if s := status(t, c); s != http.StatusAccepted {
				t.Errorf("status %d", s)
			}
		})
	})
	t.Run("a byte a minute is cut, whatever came before", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			p := pipes.Serve(t, Middleware("test", quiet(), prometheus.NewRegistry())(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if _, err := io.Copy(io.Discard, r.Body); !errors.Is(err, ErrTooSlow) {
					t.Errorf("the body ended with %v", err)
				}
				w.WriteHeader(http.StatusBadRequest)
			})))
			c, err := p.Dial()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			send(t, c, "PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000\r\n\r\n"+strings.Repeat("fast", 1<<20))
			began := time.Now()
			var wg sync.WaitGroup
			wg.Go(func() {
				for {
					time.Sleep(stallTimeout / 2)
					if _, err := c.Write([]byte("x")); err != nil {
						return
					}
				}
			})
			if s := status(t, c); s != http.StatusRequestTimeout {
				t.Errorf("status %d", s)
			}
			if d := time.Since(began); d < stallTimeout || d > stallTimeout+time.Second {
				t.Errorf("cut after %s", d)
			}
			c.Close()
			wg.Wait()
		})
	})
	t.Run("a byte a minute taken is cut", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			failed := make(chan error, 1)
			p := pipes.Serve(t, Middleware("test", quiet(), prometheus.NewRegistry())(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				_, err := io.Copy(w, strings.NewReader(strings.Repeat("x", 1<<20)))
				failed <- err
			})))
			c, err := p.Dial()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			began := time.Now()
			send(t, c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			var wg sync.WaitGroup
			wg.Go(func() {
				for {
					if _, err := c.Read(make([]byte, 1)); err != nil {
						return
					}
					time.Sleep(stallTimeout / 2)
				}
			})
			if err := <-failed; !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) > 2*stallTimeout {
				t.Errorf("the answer ended with %v after %s", err, time.Since(began))
			}
			c.Close()
			wg.Wait()
		})
	})
	t.Run("stalled upload is cut", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			failed := make(chan error, 1)
			p := pipes.Serve(t, Middleware("test", quiet(), prometheus.NewRegistry())(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				_, err := io.Copy(io.Discard, r.Body)
				failed <- err
			})))
			c, err := p.Dial()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			began := time.Now()
			send(t, c, "PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab")
			if err := <-failed; !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the body ended with %v", err)
			}
			if d := time.Since(began); d != stallTimeout {
				t.Errorf("cut after %s, want %s", d, stallTimeout)
			}
		})
	})
	t.Run("slow download goes on", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			text := strings.Repeat("x", 4*chunk)
			p := pipes.Serve(t, Middleware("test", quiet(), prometheus.NewRegistry())(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				http.ServeContent(w, r, "x.bin", time.Time{}, struct{ io.ReadSeeker }{strings.NewReader(text)})
			})))
			c, err := p.Dial()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			began := time.Now()
			send(t, c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Fatal(err)
			}
			got := 0
			for err == nil {
				time.Sleep(time.Second)
				var n int
				n, err = resp.Body.Read(make([]byte, 6<<10))
				got += n
			}
			if err != io.EOF || got != len(text) || time.Since(began) < 2*stallTimeout {
				t.Errorf("%d of %d bytes after %s: %v", got, len(text), time.Since(began), err)
			}
		})
	})
	t.Run("stalled download is cut", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			failed := make(chan error, 1)
			p := pipes.Serve(t, Middleware("test", quiet(), prometheus.NewRegistry())(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				_, err := io.Copy(w, strings.NewReader(strings.Repeat("x", 1<<20)))
				failed <- err
			})))
			c, err := p.Dial()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			began := time.Now()
			send(t, c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			if err := <-failed; !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the answer ended with %v", err)
			}
			if d := time.Since(began); d != stallTimeout {
				t.Errorf("cut after %s, want %s", d, stallTimeout)
			}
		})
	})
}

// TestWorkBetweenBytes: the deadline of the last byte is no limit on what a handler does after it.
func TestWorkBetweenBytes(t *testing.T) {
	const work = 3 * stallTimeout
	for name, tc := range map[string]struct {
		h    http.HandlerFunc
		want int
	}{
		"commit after the body": {func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			time.Sleep(work)
			w.WriteHeader(http.StatusCreated)
		}, http.StatusCreated},
		"body left alone": {func(w http.ResponseWriter, _ *http.Request) {
			time.Sleep(work)
			w.WriteHeader(http.StatusConflict)
		}, http.StatusConflict},
		"one answer after another": {func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			_, _ = io.WriteString(w, "body")
		}, http.StatusOK},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := pipes.Serve(t, Middleware("test", quiet(), prometheus.NewRegistry())(tc.h))
				c, err := p.Dial()
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				br := bufio.NewReader(c)
				for range 3 {
					send(t, c, "PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab")
					resp, err := http.ReadResponse(br, nil)
					if err != nil {
						t.Fatal(err)
					}
					readAll(t, resp.Body)
					if resp.StatusCode != tc.want {
						t.Fatalf("status %d, want %d", resp.StatusCode, tc.want)
					}
					time.Sleep(stallTimeout + time.Second)
				}
			})
		})
	}
}

func TestRequestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	h := Middleware("test", quiet(), reg)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		_, _ = io.WriteString(w, "12345")
	}))
	for _, rq := range [][2]string{{"GET", "/"}, {"GET", "/no"}, {"BREW", "/"}} {
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(rq[0], rq[1], nil))
	}
	w := httptest.NewRecorder()
	AdminHandler(ServerConfig{}, NewHealth(), reg).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for _, line := range []string{
		`kraken_http_requests_total{method="GET",role="test",status="200"} 1`,
		`kraken_http_requests_total{method="GET",role="test",status="404"} 1`,
		`kraken_http_requests_total{method="other",role="test",status="200"} 1`,
		`kraken_http_sent_bytes_total{role="test"} 10`,
	} {
		if !strings.Contains(w.Body.String(), line+"\n") {
			t.Errorf("/metrics has no line %s", line)
		}
	}
}

func send(t *testing.T, w io.Writer, text string) {
	t.Helper()
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
}

func status(t *testing.T, r io.Reader) int {
	t.Helper()
	resp, err := http.ReadResponse(bufio.NewReader(r), nil)
	if err != nil {
		t.Fatal(err)
	}
	readAll(t, resp.Body)
	return resp.StatusCode
}
