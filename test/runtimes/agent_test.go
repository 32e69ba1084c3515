package runtimes

import (
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/agent/mirror"
	"kraken/proto/registry"
	"kraken/test/cluster"
	"kraken/test/upstream"
)

// mirroring starts a cluster with one agent that mirrors two registries: one by its own name, and Docker Hub, both
// played by up.
func mirroring(t *testing.T, up *upstream.Registry, more map[string]any) *cluster.Cluster {
	t.Helper()
	own := map[string]any{"registry": up.Host, "plain_http": true, "tag_ttl": "1s"}
	for k, v := range more {
		own[k] = v
	}
	hub := map[string]any{"registry": "docker.io", "endpoints": []any{map[string]any{"url": up.URL, "plain_http": true}}}
	return cluster.NewMirror(t, 2, 1, map[string]any{"registries": []any{own, hub}, "allow_addresses": []any{"127.0.0.1/32"}})
}

// Each runtime pulls an image of another registry by its unchanged name through the agent: the cluster asks that
// registry once, and when the registry has gone every runtime still pulls it. A registry that is not mirrored is asked
// by the runtime itself, at once.
func TestPullsThroughAnAgent(t *testing.T) {
	up, foreign := upstream.New(t, upstream.Options{}), upstream.New(t, upstream.Options{})
	img := newImage(t, "through", 3_000_000)
	img.put(up, "team/app", "library/app")
	c := mirroring(t, up, nil)
	agentURL := c.Agents[0].Base()
	var started []runtime
	for _, k := range kinds {
		started = append(started, k.start(t, agentURL, up.Host, foreign.Host))
	}
	name := up.Host + "/team/app:v1"
	for i, r := range started {
		began := time.Now()
		if err := r.pull(name); err != nil {
			t.Errorf("%s: %v", kinds[i].name, err)
		}
		t.Logf("%-22s %s through the agent", kinds[i].name, time.Since(began).Round(time.Millisecond))
		if i > 0 {
			continue
		}
		for kind, want := range map[string]int{"manifest": 1, "blob": 2} {
			n := map[string]bool{}
			for _, q := range up.Requests() {
				if q.Kind == kind && q.Method == http.MethodGet {
					n[q.Reference] = true
				}
			}
			if len(n) != want {
				t.Errorf("the upstream was asked for %d of kind %s, want %d: %+v", len(n), kind, want, up.Requests())
			}
		}
		up.Forget()
		up.Fail(upstream.Rule{Kind: "manifest", Status: 500}) // whoever asks for content now gets none
		up.Fail(upstream.Rule{Kind: "blob", Status: 500})
	}
	if n := up.Count("blob", ""); n > 0 {
		t.Errorf("what the cluster has was asked for %d times", n)
	}
	for i, r := range started {
		repo := "foreign/" + strings.ReplaceAll(kinds[i].name, " ", "-")
		newImage(t, repo, 10_000).put(foreign, repo)
		if err := r.pull(foreign.Host + "/" + repo + ":v1"); err != nil {
			t.Errorf("%s, of a registry that is not mirrored: %v", kinds[i].name, err)
		}
	}
}

// Docker pulls from Docker Hub by short names: the agent's listener stands for it.
func TestDockerPullsThroughAnAgent(t *testing.T) {
	up := upstream.New(t, upstream.Options{})
	newImage(t, "docker", 1_000_000).put(up, "library/app")
	c := mirroring(t, up, nil)
	docker := dockerd(t, c.Agents[0].Base(), c.DockerHub(0))
	if err := docker.pull("app:v1"); err != nil {
		t.Fatal(err)
	}
	if up.Count("manifest", "library/app") != 1 || up.Count("blob", "library/app") < 2 {
		t.Errorf("the cluster has asked %+v", up.Requests())
	}
}

// dockerd starts a Docker daemon of the test's own, with the agent's listener in registry-mirrors.
func dockerd(t *testing.T, agentURL, hubURL string) runtime {
	t.Helper()
	bin, docker := program(t, "dockerd"), program(t, "docker")
	need(t, os.Geteuid() == 0, "root, for dockerd,")
	root := installed(t, mirror.Settings{Agent: agentURL, DockerHub: hubURL, Runtimes: []string{"docker"}})
	dir, err := os.MkdirTemp("/tmp", "kd")
	if err != nil {
		t.Fatal(err)
	}
	socket := "unix://" + dir + "/d.sock"
	log, err := os.Create(dir + "/log")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "--config-file", filepath.Join(root, "etc/docker/daemon.json"), "--data-root", dir+"/data", "--exec-root", dir+"/exec", "--pidfile", dir+"/pid",
		"-H", socket, "--bridge", "none", "--iptables=false", "--ip-masq=false", "--storage-driver", "vfs")
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said := func() string {
		b, err := os.ReadFile(dir + "/log")
		if err != nil {
			return err.Error()
		}
		return last(string(b), 3000)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt) // it may have ended
		_ = cmd.Wait()
		log.Close()
		if t.Failed() {
			t.Log(said())
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Log(err)
		}
	})
	for deadline := time.Now().Add(60 * time.Second); command(docker, "-H", socket, "version") != nil; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("dockerd does not start:\n%s", said())
		}
	}
	return runtime{name: "docker", byPath: true, pull: func(image string) error { return command(docker, "-H", socket, "pull", image) }}
}

// A private image is pulled by who shows the pull secret that its registry takes, and by nobody else, also once the
// cluster has it. Only containerd sends secrets to a mirror, and here only the agent can reach the registry: the
// runtime does not trust its certificate.
func TestCallersSecretsReachTheUpstream(t *testing.T) {
	up := upstream.New(t, upstream.Options{TLS: true, Basic: true, User: "pod", Password: "secret"})
	img := newImage(t, "private", 1_000_000)
	img.put(up, "team/secret")
	c := mirroring(t, up, map[string]any{"plain_http": false, "ca": up.CAFile, "modes": []any{map[string]any{"repository": "**", "mode": "caller"}}})
	name := up.Host + "/team/secret:v1"
	for i, k := range kinds[:4] {
		r := k.start(t, c.Agents[0].Base(), up.Host)
		if err := r.pull(name); err == nil {
			t.Errorf("%s: without a secret it was pulled", k.name)
		}
		if err := r.pullAs("pod:wrong", name); err == nil {
			t.Errorf("%s: with another secret it was pulled", k.name)
		}
		if err := r.pullAs("pod:secret", name); err != nil {
			t.Errorf("%s: %v", k.name, err)
		}
		if i == 0 {
			up.Forget()
		}
	}
	if n := up.Count("blob", ""); n > 0 {
		t.Errorf("what the cluster has was asked for %d times", n)
	}
	_, err := c.Agents[0].OpenBlob(t.Context(), "some/repo", digest.FromBytes(img.layer), registry.Whole)
	if !errors.Is(err, registry.ErrBlobUnknown) {
		t.Errorf("a private layer by way of a repository that does not have it: %v", err)
	}
}
