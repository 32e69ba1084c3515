package main

import (
	"bytes"
	"embed"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/template"
)

//go:embed templates/*.yaml
var templates embed.FS

// writeConfigs writes each component's configuration, so that a developer can read and change what is running.
func (cl *cluster) writeConfigs() error {
	t, err := template.ParseFS(templates, "templates/*.yaml")
	if err != nil {
		return err
	}
	for _, c := range cl.Components {
		if err := cl.makeStateDir(c); err != nil {
			return err
		}
		if c.Role == "testfs" {
			continue
		}
		var b bytes.Buffer
		data := map[string]any{
			"C": c, "ID": strings.TrimPrefix(c.Name, "kraken-"), "State": cl.stateDir(c), "Origins": cl.role("origin"),
			"Bucket": cl.first("testfs"), "Tracker": cl.first("tracker"), "BuildIndex": cl.first("build-index"), "Proxy": cl.first("proxy"),
		}
		if err := t.ExecuteTemplate(&b, c.Role+".yaml", data); err != nil {
			return fmt.Errorf("configuration of %s: %w", c.Name, err)
		}
		if err := os.WriteFile(filepath.Join(cl.Dir, c.Name, "config.yaml"), b.Bytes(), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (cl *cluster) role(role string) []*component {
	var out []*component
	for _, c := range cl.Components {
		if c.Role == role {
			out = append(out, c)
		}
	}
	return out
}

// first is the address of the first component of a role.
func (cl *cluster) first(role string) string {
	for _, c := range cl.role(role) {
		return c.Addr
	}
	return ""
}

// args is the command line of a component.
func (cl *cluster) args(c *component) []string {
	if c.Role == "testfs" {
		return []string{"--listen", c.Addr, "--dir", cl.stateDir(c)}
	}
	return []string{"--config", cl.configPath(c)}
}

// hints prints where the cluster is and commands to copy.
func (cl *cluster) hints(out io.Writer) {
	proxy, agent := cl.first("proxy"), cl.first("agent")
	fmt.Fprintf(out, `
The cluster is ready.
  push here    http://%[1]s     (proxy)
  pull here    http://%[2]s     (first of %[4]d agents)
  swarms       http://%[3]s/    (tracker)
  state, logs  %[5]s/<component>/

Push with docker or skopeo:
  docker tag IMAGE %[1]s/demo/app:v1 && docker push %[1]s/demo/app:v1
  skopeo copy --dest-tls-verify=false docker-archive:image.tar docker://%[1]s/demo/app:v1

Pull from an agent:
  docker pull %[2]s/demo/app:v1
  skopeo copy --src-tls-verify=false docker://%[2]s/demo/app:v1 oci:app:v1
  crictl pull %[1]s/demo/app:v1        with this hosts.toml for %[1]s in containerd's config_path:
      [host."http://%[2]s"]
        capabilities = ["pull", "resolve"]

Look with curl:
  curl http://%[1]s/v2/_catalog
  curl http://%[2]s/v2/demo/app/tags/list

Stop it: make stop-devcluster
`, proxy, agent, cl.first("tracker"), len(cl.role("agent")), cl.Dir)
}
