package transport

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kraken/proto/config"
	"kraken/test/pipes"
)

const patience = 10 * time.Second

// overPipes is a client of NewClient's shape whose connections go over p.
func overPipes(t *testing.T, p *pipes.Listener) *http.Client {
	t.Helper()
	c, err := NewClient(ClientConfig{ProgressTimeout: config.Duration(patience)}, quiet())
	if err != nil {
		t.Fatal(err)
	}
	next, ok := c.Transport.(*progress).next.(*http.Transport)
	if !ok {
		t.Fatalf("the client's transport is a %T", c.Transport.(*progress).next)
	}
	next.DialContext = p.DialContext
	t.Cleanup(next.CloseIdleConnections)
	return c
}

// TestClientGivesUpOnSilence: each phase of a request may go without a byte for the progress timeout, and no longer.
func TestClientGivesUpOnSilence(t *testing.T) {
	for name, tc := range map[string]struct {
		h    http.HandlerFunc
		body io.Reader
	}{
		"no header": {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, nil},
		"no body": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "10")
			_, _ = io.WriteString(w, "1234")
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := overPipes(t, pipes.Serve(t, tc.h))
				began := time.Now()
				err := fetch(t, c, tc.body)
				if !errors.Is(err, ErrNoProgress) {
					t.Errorf("ended with %v, want ErrNoProgress", err)
				}
				if d := time.Since(began); d != patience {
					t.Errorf("gave up after %s, want %s", d, patience)
				}
			})
		})
	}
}

// TestRequestsMayBeImpatient: a context's progress timeout shortens the client's for every phase of its requests, and
// never lengthens it.
func TestRequestsMayBeImpatient(t *testing.T) {
	for name, tc := range map[string]struct {
		asked, want time.Duration
		first       string // what is sent before the silence
	}{
		"no header":       {time.Second, time.Second, ""},
		"no body":         {time.Second, time.Second, "1234"},
		"longer is no-op": {2 * patience, patience, "1234"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := overPipes(t, pipes.Serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if tc.first != "" {
						w.Header().Set("Content-Length", "10")
						_, _ = io.WriteString(w, tc.first)
						_ = http.NewResponseController(w).Flush()
					}
					<-r.Context().Done()
				})))
				began := time.Now()
				req, err := http.NewRequestWithContext(WithProgressTimeout(t.Context(), tc.asked), http.MethodGet, "http://test/", nil)
				if err != nil {
					t.Fatal(err)
				}
				resp, err := c.Do(req)
				if err == nil {
					_, err = io.ReadAll(resp.Body)
					resp.Body.Close()
				}
				if !errors.Is(err, ErrNoProgress) {
					t.Errorf("ended with %v, want ErrNoProgress", err)
				}
				if d := time.Since(began); d != tc.want {
					t.Errorf("gave up after %s, want %s", d, tc.want)
				}
			})
		})
	}
}

// selfWriter is a source that writes by itself, n blocks, each after a pause.
type selfWriter struct {
	io.Reader
	n     int
	pause time.Duration
}

const selfBlock = 100 << 10

func (s selfWriter) WriteTo(w io.Writer) (n int64, err error) {
	for range s.n {
		time.Sleep(s.pause)
		k, err := w.Write(make([]byte, selfBlock))
		n += int64(k)
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// TestClientGivesUpOnUnreadUpload: nobody reads what is sent.
func TestClientGivesUpOnUnreadUpload(t *testing.T) {
	t.Run("read", func(t *testing.T) { givesUpOnUnread(t, strings.NewReader(strings.Repeat("x", 1<<20))) })
	t.Run("written by the source", func(t *testing.T) { givesUpOnUnread(t, selfWriter{n: 10}) })
}

func givesUpOnUnread(t *testing.T, body io.Reader) {
	synctest.Test(t, func(t *testing.T) {
		p := pipes.Listen()
		c := overPipes(t, p)
		accepted := make(chan struct{})
		go func() {
			defer close(accepted)
			conn, err := p.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			time.Sleep(3 * patience) // a connection that is open, and silent
		}()
		began := time.Now()
		err := fetch(t, c, body)
		if !errors.Is(err, ErrNoProgress) {
			t.Errorf("ended with %v, want ErrNoProgress", err)
		}
		if d := time.Since(began); d != patience {
			t.Errorf("gave up after %s, want %s", d, patience)
		}
		<-accepted
	})
}

// TestSlowIsNotSilent: a transfer of any length goes on as long as bytes move, and neither a slow source nor a slow
// reader of ours is the other side's fault.
func TestSlowIsNotSilent(t *testing.T) {
	const step = patience - time.Second
	t.Run("slow answer", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := overPipes(t, pipes.Serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				for range 5 {
					time.Sleep(step)
					_, _ = io.WriteString(w, "x")
					_ = http.NewResponseController(w).Flush()
				}
			})))
			if err := fetch(t, c, nil); err != nil {
				t.Error(err)
			}
		})
	})
	t.Run("slow source", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := overPipes(t, pipes.Serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })))
			if err := fetch(t, c, &slowReader{n: 3, pause: 5 * patience}); err != nil {
				t.Error(err)
			}
		})
	})
	t.Run("slow source that writes by itself", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			got := make(chan int64, 1)
			c := overPipes(t, pipes.Serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				n, _ := io.Copy(io.Discard, r.Body)
				got <- n
			})))
			if err := fetch(t, c, selfWriter{n: 3, pause: 5 * patience}); err != nil {
				t.Error(err)
			}
			if n := <-got; n != 3*selfBlock {
				t.Errorf("%d bytes arrived, want %d", n, 3*selfBlock)
			}
		})
	})
	t.Run("slow reader", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := overPipes(t, pipes.Serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				_, _ = io.WriteString(w, strings.Repeat("x", 300<<10))
			})))
			resp, err := c.Get("http://test/")
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			for n := 0; n < 300<<10; {
				time.Sleep(3 * patience)
				k, err := io.ReadAtLeast(resp.Body, make([]byte, 100<<10), 100<<10)
				if err != nil {
					t.Fatalf("after %d bytes: %v", n, err)
				}
				n += k
			}
		})
	})
}

// TestAnswerBeforeTheBodyEnds: a source that goes on after the answer has begun does not start the clock of an answer
// that nobody reads yet.
func TestAnswerBeforeTheBodyEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := overPipes(t, pipes.Serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			rc := http.NewResponseController(w)
			if err := rc.EnableFullDuplex(); err != nil {
				t.Error(err)
			}
			_, _ = io.WriteString(w, "early")
			_ = rc.Flush()
			_, _ = io.Copy(io.Discard, r.Body)
			time.Sleep(3 * patience)
		})))
		resp, err := c.Post("http://test/", "", &slowReader{n: 3, pause: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(3*patience + 2*time.Second)
		if got := readAll(t, resp.Body); got != "early" {
			t.Errorf("read %q", got)
		}
	})
}

// TestCallersCancelStaysACancel: the caller's own end is not taken for the other side's silence.
func TestCallersCancelStaysACancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := overPipes(t, pipes.Serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://test/", nil)
		if err != nil {
			t.Fatal(err)
		}
		if resp, err := c.Do(req); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrNoProgress) {
			if err == nil {
				resp.Body.Close()
			}
			t.Errorf("ended with %v, want the caller's deadline", err)
		}
	})
}

// TestConnectionsAreKept pins that answers read to their end leave a connection for the next request.
func TestConnectionsAreKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pipes.Serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "x") }))
		c := overPipes(t, p)
		for range 5 {
			if err := fetch(t, c, nil); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		if n := p.Dials(); n != 1 {
			t.Errorf("%d connections for five requests", n)
		}
	})
}

func TestClientNeitherFollowsNorInflates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := overPipes(t, pipes.Serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if e := r.Header.Get("Accept-Encoding"); e != "" {
				t.Errorf("asked for encoding %q", e)
			}
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
		})))
		resp, err := c.Get("http://test/")
		if err != nil {
			t.Fatal(err)
		}
		readAll(t, resp.Body)
		if resp.StatusCode != http.StatusTemporaryRedirect {
			t.Errorf("status %d, want the redirect itself", resp.StatusCode)
		}
	})
}

func TestClientRefusesBadFiles(t *testing.T) {
	for name, cfg := range map[string]ClientConfig{
		"no such authority": {CA: "/nonexistent"},
		"key alone":         {Key: "/nonexistent"},
		"no such pair":      {Cert: "/nonexistent", Key: "/nonexistent"},
	} {
		if _, err := NewClient(cfg, quiet()); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func fetch(t *testing.T, c *http.Client, body io.Reader) error {
	t.Helper()
	method := http.MethodGet
	if body != nil {
		method = http.MethodPut
	}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://test/", body)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

// slowReader gives n bytes, each after a pause.
type slowReader struct {
	n     int
	pause time.Duration
}

func (s *slowReader) Read(p []byte) (int, error) {
	if s.n == 0 {
		return 0, io.EOF
	}
	time.Sleep(s.pause)
	s.n--
	p[0] = 'x'
	return 1, nil
}

// TestDialerIsTheClients: who connects beside the client does it as the client would, and waits no longer.
func TestDialerIsTheClients(t *testing.T) {
	asked := ""
	dial := ClientConfig{DialTimeout: config.Duration(time.Minute), Dial: func(ctx context.Context, _, addr string) (net.Conn, error) {
		asked = addr
		if end, ok := ctx.Deadline(); !ok || time.Until(end) > time.Minute {
			t.Errorf("a connection may take until %v", end)
		}
		return nil, net.ErrClosed
	}}.Dialer()
	if _, err := dial(t.Context(), "tcp", "index:1"); !errors.Is(err, net.ErrClosed) || asked != "index:1" {
		t.Errorf("asked for %q: %v", asked, err)
	}
}
