package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kraken/proto/role"
	"kraken/test/mounts"
	"kraken/test/pipes"
)

// A listener that does not answer makes the watchdog bark, whether it is silent or has gone.
func TestWatchdogBarks(t *testing.T) {
	hang := make(chan struct{})
	silent := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-hang:
		case <-r.Context().Done():
		}
	}))
	defer silent.Close()
	defer close(hang)
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	notAccepting, err := net.Listen("tcp", "127.0.0.1:0") // as where no descriptor is left
	if err != nil {
		t.Fatal(err)
	}
	defer notAccepting.Close()
	var wg sync.WaitGroup
	for name, addr := range map[string]string{
		"silent": silent.Listener.Addr().String(), "gone": gone.Listener.Addr().String(), "no descriptors": notAccepting.Addr().String(),
	} {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			barked := false
			w := newWatchdog(addr, false, 900*time.Millisecond, func(err error) {
				barked = errors.Is(err, errHung)
			})
			if err := w.run(ctx); err != nil || !barked {
				t.Errorf("%s: barked %v, %v", name, barked, err)
			}
		})
	}
	wg.Wait()
}

// A listener that answers anything does not make it bark, nor one that wants a certificate.
func TestWatchdogDoesNotBark(t *testing.T) {
	for name, c := range map[string]struct{ serves, asks bool }{ // with TLS
		"alive": {false, false}, "alive with TLS": {true, true}, "TLS where plain HTTP is asked": {true, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := pipes.Listen()
				s := httptest.NewUnstartedServer(http.NotFoundHandler())
				s.Listener.Close()
				s.Listener = l
				s.Config.ErrorLog = log.New(io.Discard, "", 0)
				if c.serves {
					s.StartTLS()
				} else {
					s.Start()
				}
				defer s.Close()
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				w := newWatchdog(l.Addr().String(), c.asks, 900*time.Millisecond, func(err error) { t.Errorf("it barks: %v", err) })
				w.client.Transport.(*http.Transport).DialContext = l.DialContext
				if err := w.run(ctx); err != nil || l.Dials() < 100 {
					t.Errorf("%v after %d questions", err, l.Dials())
				}
			})
		})
	}
}

// childConfig names, in the environment, the configuration with which this test binary is an agent.
const childConfig = "KRAKEN_TEST_AGENT_CONFIG"

// TestAgentProcess is an agent in a process of its own, for tests that make one hang.
func TestAgentProcess(t *testing.T) {
	path := os.Getenv(childConfig)
	if path == "" {
		return
	}
	os.Exit(role.Execute(t.Context(), role.Command("agent", "", New), []string{"--config", path}, os.Stdout, os.Stderr))
}

// An agent whose disk does not answer any more, so that no pull would end, closes its listener and ends with the stacks
// of all goroutines: its runtime then goes on at the upstream at once, and not after minutes.
func TestHungAgentEndsItself(t *testing.T) {
	if !mounts.Alone(t) {
		return
	}
	disk := mounts.Frozen(t)
	config := filepath.Join(t.TempDir(), "agent.yaml")
	text := fmt.Sprintf("server: {listen: \"127.0.0.1:0\"}\nnames: [kraken.example]\norigins: [{id: o, url: \"http://127.0.0.1:1\"}]\nbuild_index: {url: \"http://127.0.0.1:1\"}\n"+
		"tracker: {url: \"http://127.0.0.1:1\"}\npeer: {listen: \"127.0.0.1:0\", stock_peers: true}\ncache: {dir: %q}\nwatchdog: 3s\n", filepath.Join(disk.Dir, "cache"))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var said complaints
	cmd := exec.Command(os.Args[0], "-test.run", "^TestAgentProcess$")
	cmd.Env, cmd.Stderr = append(os.Environ(), childConfig+"="+config), &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var addr string
	eventually(t, "the agent says where it listens", func() bool {
		_, rest, ok := strings.Cut(said.String(), "msg=listening listener=registry addr=")
		addr, _, _ = strings.Cut(rest, "\n")
		return ok && strings.Contains(rest, "\n")
	})
	health := func() error {
		resp, err := (&http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}).Get("http://" + addr + "/health")
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	eventually(t, "the agent answers", func() bool { return health() == nil })
	disk.Freeze()
	began := time.Now()
	var refused *net.OpError
	eventually(t, "nobody listens any more", func() bool {
		err := health()
		return errors.As(err, &refused) && refused.Op == "dial" && !refused.Timeout()
	})
	t.Logf("nobody listens %s after the disk froze", time.Since(began).Round(time.Millisecond))
	disk.Thaw()
	err := cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("it ended with %v", err)
	}
	if !strings.Contains(said.String(), "does not answer on its own listener") || !strings.Contains(said.String(), "agent.(*Agent).health") {
		t.Errorf("the log lacks why, or the stack that hangs:\n%s", said.String())
	}
}
