package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/anacrolix/torrent"
	"github.com/anacrolix/torrent/metainfo"
	"github.com/anacrolix/torrent/storage"

	"kraken/deploy/devcluster"
	"kraken/proto/blob"
	"kraken/test/bench/report"
)

const cpuSize = 1 << 30

// cpuRow measures CPU seconds of a GiB delivered to n agents on loopback: all Kraken processes, without the client that
// reads from the agent; beside a plain HTTP server whose clients write and hash the file, and beside the library alone.
func cpuRow(n int) func(*bench, context.Context) error {
	return func(b *bench, ctx context.Context) (err error) {
		c, err := b.newCluster(ctx, options{agents: n})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, c.close()) }()
		var kraken, web, library []float64
		for range b.repeat {
			blob, err := c.push(ctx, cpuSize)
			if err != nil {
				return err
			}
			k, err := c.cpuOf(ctx, blob)
			if err != nil {
				return err
			}
			file := filepath.Join(c.plan.Dir, "file")
			if err := writeBlob(file, blob); err != nil {
				return err
			}
			w, err := b.child(ctx, "http", n, file)
			if err != nil {
				return err
			}
			l, err := b.child(ctx, "library", n, file)
			if err != nil {
				return err
			}
			gib := float64(n)
			kraken, web, library = append(kraken, k/gib), append(web, w/gib), append(library, l/gib)
			if err := errors.Join(os.Remove(file), c.renew(ctx)); err != nil {
				return err
			}
		}
		params := map[string]any{"agents": n, "mib": cpuSize / mib}
		beside := map[string]any{"kraken_s": report.Median(kraken), "http_s": report.Median(web), "library_s": report.Median(library)}
		b.add(report.AtMost("CPU of a GiB, beside HTTP", params, report.Median(kraken)/report.Median(web), "x", 2.0, beside))
		ratio := report.Median(kraken) / report.Median(library)
		if n == 4 {
			b.add(report.AtMost("CPU of a GiB, beside the library", params, ratio, "x", 0.65, beside))
		} else {
			b.add(report.Plain("CPU of a GiB, beside the library", params, ratio, "x", beside))
		}
		return nil
	}
}

// cpuOf pulls a blob with all agents at once and returns the CPU seconds of all processes.
func (c *cluster) cpuOf(ctx context.Context, b blobOf) (float64, error) {
	before, err := c.cpu()
	if err != nil {
		return 0, err
	}
	errs := make([]error, len(c.agents))
	var wg sync.WaitGroup
	for i, a := range c.agents {
		wg.Go(func() { _, errs[i] = c.pull(ctx, a, b) })
	}
	wg.Wait()
	after, err := c.cpu()
	return (after - before).Seconds(), errors.Join(append(errs, err)...)
}

func (c *cluster) cpu() (sum time.Duration, err error) {
	for _, p := range c.plan.Components {
		t, err := devcluster.CPU(p.PID())
		if err != nil {
			return 0, err
		}
		sum += t
	}
	return sum, nil
}

func writeBlob(path string, b blobOf) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, b.reader())
	return errors.Join(err, f.Close())
}

// child runs this program once more for one of the contestants, so that its CPU can be told from ours, and returns its
// CPU seconds.
func (b *bench) child(ctx context.Context, what string, n int, file string) (float64, error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	cmd := exec.CommandContext(ctx, self)
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %s", childEnv, what, n, file))
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("%s: %w", what, err)
	}
	return (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds(), nil
}

// childEnv tells a child what to do; it is no flag because nobody else should use it.
const childEnv = "KRAKEN_BENCH_CHILD"

func runChild(task string) error {
	var what, file string
	var n int
	if _, err := fmt.Sscanf(task, "%s %d %s", &what, &n, &file); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(filepath.Dir(file), "child-")
	if err != nil {
		return err
	}
	run := httpChild
	if what == "library" {
		run = libraryChild
	}
	return errors.Join(run(n, file, dir), os.RemoveAll(dir))
}

// httpChild serves the file, and n clients fetch, write and hash it.
func httpChild(n int, file, dir string) error {
	l, err := devcluster.Host{IP: "127.0.0.1"}.Listen(0)
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: http.FileServer(http.Dir(filepath.Dir(file))), ReadHeaderTimeout: time.Minute}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			errs[i] = download(fmt.Sprintf("http://%s/%s", l.Addr(), filepath.Base(file)), filepath.Join(dir, fmt.Sprint(i)))
		})
	}
	wg.Wait()
	err = errors.Join(append(errs, srv.Close())...)
	if serr := <-served; !errors.Is(serr, http.ErrServerClosed) {
		err = errors.Join(err, serr)
	}
	return err
}

func download(from, path string) error {
	resp, err := http.Get(from)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	h := sha256.New()
	_, err = io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(f, h)}, resp.Body, make([]byte, 256<<10))
	return errors.Join(err, f.Close())
}

// libraryChild moves the file by the bare library: default settings, file storage, one seed and n leechers.
func libraryChild(n int, file, dir string) (err error) {
	info := metainfo.Info{PieceLength: blob.PieceLength(cpuSize)}
	if err := info.BuildFromFilePath(file); err != nil {
		return err
	}
	raw, err := infoBytes(info)
	if err != nil {
		return err
	}
	client := func(dataDir string, seed bool) (*torrent.Client, error) {
		cfg := torrent.NewDefaultClientConfig()
		cfg.DataDir, cfg.Seed, cfg.ListenPort = dataDir, seed, 0
		cfg.DefaultStorage = storage.NewFile(dataDir)
		cfg.NoDHT, cfg.DisableTrackers, cfg.NoDefaultPortForwarding, cfg.DisableIPv6 = true, true, true, true
		cfg.SetListenAddr("127.0.0.1:0")
		return torrent.NewClient(cfg)
	}
	seeder, err := client(filepath.Dir(file), true)
	if err != nil {
		return err
	}
	defer seeder.Close()
	mi := metainfo.MetaInfo{InfoBytes: raw}
	seed, err := seeder.AddTorrent(&mi)
	if err != nil {
		return err
	}
	if err := seed.VerifyDataContext(context.Background()); err != nil {
		return err
	}
	var wg sync.WaitGroup
	clients := []*torrent.Client{seeder}
	var all []*torrent.Torrent
	for i := range n {
		c, err := client(filepath.Join(dir, fmt.Sprint(i)), true)
		if err != nil {
			return err
		}
		defer c.Close()
		t, err := c.AddTorrent(&mi)
		if err != nil {
			return err
		}
		clients, all = append(clients, c), append(all, t)
	}
	for i, t := range all {
		t.DownloadAll()
		for k, c := range clients {
			if k != i+1 {
				t.AddClientPeer(c)
			}
		}
	}
	for _, t := range all {
		wg.Go(func() { <-t.Complete().On() })
	}
	wg.Wait()
	return nil
}
