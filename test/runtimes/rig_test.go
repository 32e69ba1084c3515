// Package runtimes runs real container runtimes against mirrors: what they do with each answer, and that they pull
// through an agent by the unchanged names of images.
package runtimes

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/agent/mirror"
	"kraken/test/upstream"
)

var stateFlag = flag.String("state", "/tmp", "where runtimes keep their images; a short name")

// need skips a test that lacks something, or fails it where nothing may be skipped.
func need(t *testing.T, ok bool, what string) {
	t.Helper()
	switch {
	case ok:
	case os.Getenv("KRAKEN_TEST_REQUIRE") == "1":
		t.Fatalf("KRAKEN_TEST_REQUIRE=1, but %s is missing", what)
	default:
		t.Skipf("%s is missing", what)
	}
}

// program returns the path of a program in bin/tools, or installed.
func program(t *testing.T, name string) string {
	t.Helper()
	p, err := filepath.Abs(filepath.Join("..", "..", "bin", "tools", name))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(p); err == nil {
		return p
	}
	p, err = exec.LookPath(name)
	need(t, err == nil, name+" (make test-tools, test/setup.sh all)")
	return p
}

// runtime is a program that pulls images by name, set up by `kraken-agent mirror install` to ask a mirror first.
type runtime struct {
	name string
	// byPath says that it names the registry in the path, and chooses one mirror for a whole image.
	byPath bool
	pull   func(image string) error
	// pullAs is with user:password, as kubelet passes an imagePullSecret on; nil where that is not known.
	pullAs func(user, image string) error
	// remove forgets a pulled image; nil where that is not known.
	remove func(image string) error
}

// kind is a kind of runtime.
type kind struct {
	name  string
	start func(t *testing.T, mirrorURL string, registries ...string) runtime
}

// kinds are the runtimes that are tested. Each starts one for a mirror; registries are what it asks the mirror for, by
// a runtime that has to be told.
var kinds = []kind{
	{"containerd 1.6", containerd("containerd", "1.6", "")},
	{"containerd 2 transfer", containerd("containerd2", "2.4", "")},
	{"containerd 2 local", containerd("containerd2", "2.4", "[plugins.'io.containerd.cri.v1.images']\nuse_local_image_pull = true\n")},
	inChunks(64 << 10),
	{"skopeo", skopeo},
	{"podman", podman},
}

// inChunks is a containerd that fetches layers in chunks of so many bytes, three at once, which is its default.
func inChunks(size int) kind {
	return kind{"containerd 2 parallel", containerd("containerd2", "2.4", fmt.Sprintf("[plugins.'io.containerd.transfer.v1.local']\nconcurrent_layer_fetch_buffer = %d\n", size))}
}

// docker has mirrors for Docker Hub alone: it takes any name for one of there.
var docker = kind{"docker", func(t *testing.T, mirrorURL string, _ ...string) runtime {
	r := dockerd(t, mirrorURL, mirrorURL)
	pull := r.pull
	r.pull = func(image string) error {
		_, repo, _ := strings.Cut(image, "/")
		return pull(repo)
	}
	return r
}}

// hubHost is what Docker goes on to.
const hubHost = "registry-1.docker.io"

// installed runs mirror.Install on a root of its own, and returns that.
func installed(t *testing.T, s mirror.Settings) string {
	t.Helper()
	s.Root = t.TempDir()
	if err := mirror.Install(s, io.Discard); err != nil {
		t.Fatal(err)
	}
	return s.Root
}

// containerd returns what starts a containerd with more in its configuration.
func containerd(name, version, more string) func(*testing.T, string, ...string) runtime {
	return func(t *testing.T, mirrorURL string, _ ...string) runtime {
		t.Helper()
		bin, crictl := program(t, name), program(t, "crictl")
		need(t, os.Geteuid() == 0, "root, for containerd,")
		if name == "containerd" { // Debian's may be another, later
			out, err := exec.Command(bin, "--version").Output()
			need(t, err == nil && strings.Contains(string(out), " 1."), "containerd 1.x")
		}
		root := installed(t, mirror.Settings{Agent: mirrorURL, Runtimes: []string{"containerd"}, ContainerdVersion: version})
		dir, err := os.MkdirTemp(*stateFlag, "kc") // sockets have short names
		if err != nil {
			t.Fatal(err)
		}
		certs := filepath.Join(root, "etc/containerd/certs.d")
		config := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\n[grpc]\naddress = %q\n[plugins.'io.containerd.grpc.v1.cri']\ndisable_tcp_service = true\n"+
			"[plugins.'io.containerd.grpc.v1.cri'.registry]\nconfig_path = %q\n", dir+"/root", dir+"/state", dir+"/s", certs)
		if version[0] == '2' {
			config = fmt.Sprintf("version = 3\nroot = %q\nstate = %q\n[grpc]\naddress = %q\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = %q\n%s",
				dir+"/root", dir+"/state", dir+"/s", certs, more)
			if transfer := "[plugins.'io.containerd.transfer.v1.local']\n"; strings.Contains(more, transfer) {
				config = strings.Replace(config, transfer, transfer+fmt.Sprintf("config_path = %q\n", certs), 1)
			} else {
				config += transfer + fmt.Sprintf("config_path = %q\n", certs)
			}
		}
		file := filepath.Join(dir, "config.toml")
		if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		var log bytes.Buffer
		cmd := exec.Command(bin, "--config", file)
		cmd.Stdout, cmd.Stderr = &log, &log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Signal(os.Interrupt) // it may have ended
			_ = cmd.Wait()
			if t.Failed() {
				t.Logf("%s's log:\n%s", name, last(log.String(), 3000))
			}
			if err := os.RemoveAll(dir); err != nil {
				t.Log(err)
			}
		})
		run := func(args ...string) error {
			return command(crictl, append([]string{"--runtime-endpoint", "unix://" + dir + "/s", "--image-endpoint", "unix://" + dir + "/s", "--timeout", "60s"}, args...)...)
		}
		for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(100 * time.Millisecond) {
			if err := run("images"); err == nil {
				break
			} else if time.Now().After(deadline) {
				t.Fatalf("it does not start: %v\n%s", err, last(log.String(), 3000))
			}
		}
		return runtime{name: name, pull: func(image string) error { return run("pull", image) }, pullAs: func(user, image string) error {
			return run("pull", "--creds", user, image)
		}, remove: func(image string) error { return run("rmi", image) }}
	}
}

// registriesConf returns the path of a registries.conf in which registries have the mirror.
func registriesConf(t *testing.T, mirrorURL string, registries []string) string {
	t.Helper()
	root := installed(t, mirror.Settings{Agent: mirrorURL, Runtimes: []string{"containers"}, Registries: registries})
	return filepath.Join(root, "etc/containers/registries.conf.d/50-kraken.conf")
}

func skopeo(t *testing.T, mirrorURL string, registries ...string) runtime {
	t.Helper()
	bin, conf := program(t, "skopeo"), registriesConf(t, mirrorURL, registries)
	return runtime{name: "skopeo", byPath: true, pull: func(image string) error {
		return command(bin, "--registries-conf", conf, "copy", "--insecure-policy", "--src-tls-verify=false", "docker://"+image, "dir:"+t.TempDir())
	}}
}

func podman(t *testing.T, mirrorURL string, registries ...string) runtime {
	t.Helper()
	bin, conf := program(t, "podman"), registriesConf(t, mirrorURL, registries)
	home, err := os.MkdirTemp("/tmp", "kp") // podman refuses long names
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"CONTAINERS_REGISTRIES_CONF=" + conf, bin, "--root", home + "/r", "--runroot", home + "/u", "--storage-driver", "vfs"}
	t.Cleanup(func() {
		if err := command("env", append(args, "system", "reset", "-f")...); err != nil {
			t.Log(err)
		}
		if err := os.RemoveAll(home); err != nil {
			t.Log(err)
		}
	})
	return runtime{name: "podman", byPath: true, pull: func(image string) error {
		return command("env", append(args, "pull", "--tls-verify=false", image)...)
	}}
}

func last(text string, n int) string { return text[max(0, len(text)-n):] }

// command runs a program, whose output is in the error.
func command(name string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, last(string(out), 2000))
	}
	return nil
}

// image is what a runtime can unpack: a config and one layer, which is a tar archive of size bytes and a little more.
type image struct{ config, layer, manifest []byte }

func newImage(t *testing.T, seed string, size int) image {
	t.Helper()
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	content := bytes.Repeat([]byte(seed), size/len(seed)+1)[:size]
	if err := w.WriteHeader(&tar.Header{Name: "file", Mode: 0o644, Size: int64(len(content))}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	marshal := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	i := image{layer: layer.Bytes()}
	i.config = marshal(v1.Image{
		Platform: v1.Platform{Architecture: "amd64", OS: "linux"}, RootFS: v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(i.layer)}},
		Config: v1.ImageConfig{Cmd: []string{"/file"}, Labels: map[string]string{"seed": seed}},
	})
	i.manifest = marshal(v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		Config: v1.Descriptor{MediaType: v1.MediaTypeImageConfig, Digest: digest.FromBytes(i.config), Size: int64(len(i.config))},
		Layers: []v1.Descriptor{{MediaType: v1.MediaTypeImageLayer, Digest: digest.FromBytes(i.layer), Size: int64(len(i.layer))}},
	})
	return i
}

// put gives a registry the image, as repositories' v1.
func (i image) put(r *upstream.Registry, repositories ...string) {
	for _, repo := range repositories {
		r.PutBlob(repo, i.config)
		r.PutBlob(repo, i.layer)
		r.PutManifest(repo, "v1", v1.MediaTypeImageManifest, i.manifest)
	}
}
