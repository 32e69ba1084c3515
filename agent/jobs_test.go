package agent

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kraken/proto/role"
)

// The commands find the listeners in the agent's configuration; doctor also says where pull secrets may go astray.
func TestMirrorCommands(t *testing.T) {
	caller := true
	index := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		modes := ""
		if caller {
			modes = `,"modes":[{"repository":"**","mode":"caller"}]`
		}
		fmt.Fprintf(w, `{"upstreams":[{"registry":"registry.corp"%s}]}`, modes)
	}))
	defer index.Close()
	registry := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	}))
	defer registry.Close()
	root, file := t.TempDir(), filepath.Join(t.TempDir(), "agent.yaml")
	text := fmt.Sprintf("server: {listen: %q}\nnames: [kraken.example]\norigins: [{id: o, url: \"http://127.0.0.1:1\"}]\nbuild_index: {url: %q}\ntracker: {url: \"http://127.0.0.1:1\"}\n"+
		"peer: {listen: \"127.0.0.1:0\", stock_peers: true}\ncache: {dir: %q}\n", registry.Listener.Addr(), index.URL, t.TempDir())
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) (int, string) {
		var out bytes.Buffer
		args = append([]string{"mirror"}, append(args, "--config", file, "--root", root, "--containerd-version", "1.6")...)
		code := role.Execute(t.Context(), role.Command("agent", "", New, Jobs()...), args, &out, &out)
		return code, out.String()
	}
	if code, out := run("install", "--runtimes", "containerd,containers", "--dry-run"); code != 0 || !strings.Contains(out, registry.URL) {
		t.Fatalf("a dry run: %d %s", code, out)
	}
	if code, out := run("install", "--runtimes", "containerd,containers"); code != 0 || !strings.Contains(out, "_default/hosts.toml") {
		t.Fatalf("install: %d %s", code, out)
	}
	if code, out := run("doctor", "--probe", ""); code != 1 || !strings.Contains(out, "secrets-in-reach") || strings.Count(out, "PROBLEM") != 1 {
		t.Errorf("doctor, with callers' secrets at a port of anybody's: %d %s", code, out)
	}
	caller = false
	if code, out := run("doctor", "--probe", ""); code != 0 || !strings.HasPrefix(out, "ok") {
		t.Errorf("doctor, all is well: %d %s", code, out)
	}
	if code, out := run("install", "--for", "talos"); code != 0 || !strings.Contains(out, "machine:") {
		t.Errorf("Talos: %d %s", code, out)
	}
	if code, out := run("uninstall"); code != 0 || !strings.Contains(out, "as it was before") {
		t.Errorf("uninstall: %d %s", code, out)
	}
}
