package devcluster

import (
	"bytes"
	"embed"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"text/template"

	"github.com/goccy/go-yaml"
)

//go:embed templates/*.yaml
var templates embed.FS

// Write makes the folders of a planned cluster and writes each component's configuration, so that a developer can read
// and change what is running. Up does it, too; by itself it is for who runs the components in another way.
func (cl *Cluster) Write() error {
	if err := os.MkdirAll(cl.Dir, 0o700); err != nil {
		return err
	}
	t, err := template.ParseFS(templates, "templates/*.yaml")
	if err != nil {
		return err
	}
	if cl.MutualTLS {
		if err := cl.writeCertificates(); err != nil {
			return err
		}
	}
	if cl.Login {
		if err := cl.writeLogin(); err != nil {
			return err
		}
	}
	recordKey, err := cl.recordKey()
	if err != nil {
		return err
	}
	if cl.folderBucket {
		if err := os.MkdirAll(cl.bucketDir(), 0o700); err != nil {
			return err
		}
	}
	for _, c := range cl.Components {
		if err := cl.makeStateDir(c); err != nil {
			return err
		}
		if c.Role == "testfs" {
			continue
		}
		text, err := cl.configOf(t, c, recordKey)
		if err != nil {
			return fmt.Errorf("configuration of %s: %w", c.Name, err)
		}
		if err := os.WriteFile(cl.ConfigPath(c), text, cl.configMode()); err != nil {
			return err
		}
		if err := os.Chmod(cl.ConfigPath(c), cl.configMode()); err != nil { // it may be there, of another runtime
			return err
		}
	}
	return nil
}

// view is what a template sees.
type view struct {
	C                                    *Component
	ID, State                            string
	Origins                              []*Component
	BucketDir                            string // of a bucket that is a folder
	Bucket, Tracker, BuildIndex, Proxy   string // addresses
	OriginURL, TrackerURL, BuildIndexURL string // scheme and, but for origins, address
	MutualTLS                            bool
	CA, Cert, Key, ClusterName           string // files, and what certificates name, with MutualTLS
	Login                                bool   // who comes to the proxy has to show who it is
	Rules, Htpasswd                      string // files, with Login
	Loopback                             bool   // the component listens there
	RecordKeyFile, RecordKey             string // of name records: the private key's file, the public key in base64
}

// configOf is the template of c's role, filled, and c's own keys laid over it.
func (cl *Cluster) configOf(t *template.Template, c *Component, recordKey string) ([]byte, error) {
	v := view{
		C: c, ID: c.ID(), State: cl.StateDir(c), Origins: cl.Role("origin"),
		Bucket: cl.first("testfs"), Tracker: cl.first("tracker"), BuildIndex: cl.first("build-index"), Proxy: cl.first("proxy"),
		OriginURL: cl.scheme("origin"), MutualTLS: cl.MutualTLS, RecordKeyFile: cl.recordKeyFile(), RecordKey: recordKey,
	}
	if admin, err := netip.ParseAddrPort(c.Admin); err == nil {
		v.Loopback = admin.Addr().IsLoopback()
	}
	if cl.folderBucket {
		v.BucketDir = cl.bucketDir()
	}
	v.TrackerURL, v.BuildIndexURL = cl.scheme("tracker")+v.Tracker, cl.scheme("build-index")+v.BuildIndex
	if cl.MutualTLS {
		files := cl.Certificate(c.ID())
		v.CA, v.Cert, v.Key, v.ClusterName = files.CA, files.Cert, files.Key, ClusterName
	}
	if cl.Login {
		v.Login, v.Rules, v.Htpasswd = true, cl.rulesFile(), cl.htpasswdFile()
	}
	var b bytes.Buffer
	if err := t.ExecuteTemplate(&b, c.Role+".yaml", v); err != nil {
		return nil, err
	}
	if len(cl.config[c.Role]) == 0 && len(cl.config[c.Name]) == 0 {
		return b.Bytes(), nil
	}
	var keys map[string]any
	if err := yaml.Unmarshal(b.Bytes(), &keys); err != nil {
		return nil, err
	}
	return yaml.Marshal(overlay(overlay(keys, cl.config[c.Role]), cl.config[c.Name]))
}

// bucketDir is the bucket where that is a folder.
func (cl *Cluster) bucketDir() string { return filepath.Join(cl.Dir, "bucket") }

// overlay returns a with the keys of b: a map over a map key by key, whatever else in place of what was there.
func overlay(a, b map[string]any) map[string]any {
	out := maps.Clone(a)
	if out == nil {
		out = map[string]any{}
	}
	for k, v := range b {
		under, ok1 := out[k].(map[string]any)
		over, ok2 := v.(map[string]any)
		if ok1 && ok2 {
			v = overlay(under, over)
		}
		out[k] = v
	}
	return out
}

// args is the command line of a component.
func (cl *Cluster) args(c *Component) []string {
	if c.Role == "testfs" {
		return []string{"--listen", c.Addr, "--dir", cl.StateDir(c)}
	}
	return []string{"--config", cl.ConfigPath(c)}
}

// Hints prints where the cluster is and commands to copy.
func (cl *Cluster) Hints(out io.Writer) {
	if cl.MutualTLS {
		cl.secureHints(out)
		return
	}
	proxy, agent := cl.first("proxy"), cl.first("agent")
	fmt.Fprintf(out, `
The cluster is ready.
  push here    %[6]s%[1]s     (proxy)
  pull here    http://%[2]s     (first of %[4]d agents)
  swarms       %[7]s%[3]s/    (tracker)
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
`, proxy, agent, cl.first("tracker"), len(cl.Role("agent")), cl.Dir, cl.scheme("proxy"), cl.scheme("tracker"))
}

// secureHints is Hints of a cluster with TLS.
func (cl *Cluster) secureHints(out io.Writer) {
	ca, operator := cl.Certificate("").CA, cl.Certificate("operator")
	login, user := "", ""
	if cl.Login {
		login = fmt.Sprintf("  docker login -u %s --password-stdin %s < %s      (podman, skopeo, crane likewise; rules: %s)\n",
			LoginUser, cl.first("proxy"), cl.passwordFile(), cl.rulesFile())
		user = fmt.Sprintf(" -u %s:$(cat %s)", LoginUser, cl.passwordFile())
	}
	fmt.Fprintf(out, `
The cluster is ready, with TLS between all parts.
  push here    https://%[1]s     (proxy)
  pull here    http://%[2]s     (first of %[4]d agents; loopback needs no TLS)
  authority    %[5]s     (kraken certs --dir %[6]s issues more)
  state, logs  %[7]s/<component>/

Runtimes have to trust the authority:
  mkdir -p /etc/docker/certs.d/%[1]s && cp %[5]s /etc/docker/certs.d/%[1]s/ca.crt
  mkdir -p /etc/containers/certs.d/%[1]s && cp %[5]s /etc/containers/certs.d/%[1]s/ca.crt      (podman, skopeo, buildah)
  SSL_CERT_FILE=%[5]s crane push image.tar %[1]s/demo/app:v1

Push and pull:
%[10]s  docker tag IMAGE %[1]s/demo/app:v1 && docker push %[1]s/demo/app:v1
  docker pull %[2]s/demo/app:v1

Look with curl, as an operator:
  curl --cacert %[5]s%[11]s https://%[1]s/v2/_catalog
  curl --cacert %[5]s --cert %[8]s --key %[9]s https://%[3]s/swarms

Stop it: make stop-devcluster
`, cl.first("proxy"), cl.first("agent"), cl.first("tracker"), len(cl.Role("agent")), ca, cl.CertificateDir(), cl.Dir, operator.Cert, operator.Key, login, user)
}

// configMode is the mode of configurations, which hold secrets. Containers run as another user, who must read them.
func (cl *Cluster) configMode() os.FileMode {
	if cl.Runtime == "docker" {
		return 0o644
	}
	return 0o600
}
