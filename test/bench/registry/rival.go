package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// rivalProcess is Debian's docker-registry.
type rivalProcess struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when it ended
}

// startRival starts it in a folder that it makes, and returns when it answers.
func startRival(ctx context.Context, dir string) (*contestant, error) {
	addr, err := freeAddr()
	if err != nil {
		return nil, err
	}
	// Debian's /etc/docker/registry/config.yml without its login, quiet like Kraken here, and a catalog of one page.
	cfg := fmt.Sprintf(`version: 0.1
log: {level: warn, accesslog: {disabled: true}}
storage:
  cache: {blobdescriptor: inmemory}
  filesystem: {rootdirectory: %q}
  delete: {enabled: true}
catalog: {maxentries: 10000}
http:
  addr: %s
  headers: {X-Content-Type-Options: [nosniff]}
health: {storagedriver: {enabled: true, interval: 10s, threshold: 3}}
`, filepath.Join(dir, "state"), addr)
	path, err := exec.LookPath("docker-registry")
	if err != nil {
		return nil, fmt.Errorf("%w: test/setup.sh bench installs it", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(file, []byte(cfg), 0o644); err != nil {
		return nil, err
	}
	p := &rivalProcess{cmd: exec.Command(path, "serve", file), log: filepath.Join(dir, "log"), done: make(chan struct{})}
	if err := p.start(); err != nil {
		return nil, err
	}
	if err := p.await(ctx, "http://"+addr+"/v2/"); err != nil {
		return nil, errors.Join(err, p.stop())
	}
	return &contestant{name: rival, addr: addr, scheme: "http://", rival: p}, nil
}

func (p *rivalProcess) start() error {
	log, err := os.Create(p.log)
	if err != nil {
		return err
	}
	defer log.Close()
	p.cmd.Stdout, p.cmd.Stderr = log, log
	// the terminal's interrupt ends this program, which then ends it
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", rival, err)
	}
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait() // how it ended is of interest only where it should not have: see await
	}()
	return nil
}

// await returns when a URL answers, an error when the process ended or it takes too long.
func (p *rivalProcess) await(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		err := answers(ctx, url)
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended while starting: %s", rival, p.tail())
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready after %s: %w", rival, startTimeout, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// answers returns nil when a URL is 200.
func answers(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, resp.Status)
	}
	return nil
}

// stop ends the process, and kills it when it does not end.
func (p *rivalProcess) stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(stopTimeout):
	}
	err := p.cmd.Process.Kill()
	<-p.done
	return errors.Join(fmt.Errorf("%s did not end and was killed", rival), err)
}

// tail is the end of its log.
func (p *rivalProcess) tail() string {
	text, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-4000):])
}

// freeAddr finds a port of loopback below the range from which the system takes those of outgoing connections.
func freeAddr() (string, error) {
	for port := 20_000; port < 30_000; port++ {
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
		if l, err := net.Listen("tcp", addr); err == nil {
			return addr, l.Close()
		}
	}
	return "", errors.New("no free port between 20000 and 30000")
}
