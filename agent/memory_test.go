package agent

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
)

// fillCache writes what a cache of n blobs has on the disk; the files are sparse.
func fillCache(b *testing.B, dir string, n int, size int64) {
	b.Helper()
	zeros := make([]byte, size)
	h := blob.NewPieceHasher(size)
	if _, err := h.Write(zeros); err != nil {
		b.Fatal(err)
	}
	for i := range n {
		d := digest.FromString(fmt.Sprint(i))
		m, err := h.Sum(d)
		if err != nil {
			b.Fatal(err)
		}
		p := filepath.Join(dir, "blobs", "sha256", d.Encoded()[:2], d.Encoded())
		if err := os.MkdirAll(p, 0o755); err != nil {
			b.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(p, "metainfo"), m.Marshal(), 0o644); err != nil {
			b.Fatal(err)
		}
		f, err := os.Create(filepath.Join(p, "data"))
		if err == nil {
			err = f.Truncate(size)
			f.Close()
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

// memory reads a process's resident memory and its peak, in MiB (proc(5)).
func memory(b *testing.B, pid int) (now, peak float64) {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kib, err := strconv.ParseFloat(f[1], 64)
		if err != nil {
			continue
		}
		switch f[0] {
		case "VmRSS:":
			now = kib / 1024
		case "VmHWM:":
			peak = kib / 1024
		}
	}
	return now, peak
}

// BenchmarkIdleMemory is the resident memory of an agent process with 10,000 cached blobs that announces and serves
// nobody: after it has found them all, and at its peak.
func BenchmarkIdleMemory(b *testing.B) {
	dir := b.TempDir()
	bin := filepath.Join(dir, "kraken-agent")
	if out, err := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", bin, "./cmd/kraken-agent").CombinedOutput(); err != nil {
		b.Skipf("the agent can't be built here: %v %s", err, out)
	}
	cache := filepath.Join(dir, "cache")
	fillCache(b, cache, 10_000, 2<<20)
	var announced atomic.Int64
	tracker := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		announced.Add(1)
		io.WriteString(w, `{"version":1,"interval_ns":1000000000,"blobs":[]}`)
	}))
	defer tracker.Close()
	config := filepath.Join(dir, "agent.yaml")
	text := fmt.Sprintf(`
server: {listen: "127.0.0.1:0"}
admin: {listen: "127.0.0.1:0"}
origins: [{id: o, url: "http://127.0.0.1:1"}]
build_index: {url: "http://127.0.0.1:1"}
tracker: {url: %q}
peer: {listen: "127.0.0.1:0", stock_peers: true}
cache: {dir: %q}
`, tracker.URL, cache)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		var log bytes.Buffer
		c := exec.Command(bin, "--config", config)
		c.Stderr = &log
		if err := c.Start(); err != nil {
			b.Fatal(err)
		}
		time.Sleep(20 * time.Second) // idling is what is measured
		now, peak := memory(b, c.Process.Pid)
		b.ReportMetric(now, "RSS-MiB")
		b.ReportMetric(peak, "peak-MiB")
		if err := c.Process.Signal(os.Interrupt); err != nil {
			b.Fatal(err)
		}
		if err := c.Wait(); err != nil {
			b.Errorf("%v: %s", err, log.String())
		}
		if n := announced.Load(); n < 10 {
			b.Errorf("%d announces in 20 s, want one a second", n)
		}
	}
}
