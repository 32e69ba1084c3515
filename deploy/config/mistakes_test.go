package config

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"

	"kraken/agent"
	"kraken/buildindex"
	"kraken/origin"
	"kraken/proto/role"
	"kraken/proxy"
	"kraken/tracker"
)

// commands are the roles as an operator starts them.
func commands() map[string]*cobra.Command {
	return map[string]*cobra.Command{
		"agent":       role.Command("agent", "", agent.New),
		"build-index": role.Command("build-index", "", buildindex.New),
		"origin":      role.Command("origin", "", origin.New),
		"proxy":       role.Command("proxy", "", proxy.New),
		"tracker":     role.Command("tracker", "", tracker.New),
	}
}

// check is kraken-<name> --config FILE --check.
func check(t *testing.T, name, path string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = role.Execute(t.Context(), commands()[name], []string{"--config", path, "--check"}, &out, &errs)
	return code, out.String(), errs.String()
}

// set puts values into a configuration by their paths. A path that the configuration lacks is added where its first key
// is there, or the role is known to take it; ok is false where the role has no such key.
func set(cfg map[string]any, path string, value any) (ok bool) {
	keys := strings.Split(path, ".")
	at := cfg
	for i, k := range keys[:len(keys)-1] {
		switch next := at[k].(type) {
		case map[string]any:
			at = next
		case nil:
			if i == 0 {
				return false
			}
			inner := map[string]any{}
			at[k] = inner
			at = inner
		default:
			return false
		}
	}
	last := keys[len(keys)-1]
	if _, there := at[last]; !there && len(keys) == 1 && last != "nonsense" {
		return false
	}
	at[last] = value
	return true
}

type changes map[string]any

// mistakes are what --check refuses: a set of changes to the sample, the role that they are for (default: each that has
// the keys), and the key that the message names, with what it says.
func mistakes(f files) []mistake {
	one := map[string]any{"id": "origin-01", "url": "http://127.0.0.1:16031", "peer": "127.0.0.1:16041"}
	with := func(key string, value any) []any {
		o := maps.Clone(one)
		o[key] = value
		return []any{o}
	}
	two := maps.Clone(one)
	two["id"] = "origin-02"
	withPattern := func(p string) map[string]any {
		return map[string]any{"name": "a", "url": "file:///b", "repositories": p}
	}
	bucket := func(name, url string) map[string]any { return map[string]any{"name": name, "url": url} }
	tls := func(kv ...string) map[string]any {
		m := map[string]any{}
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = kv[i+1]
		}
		return m
	}
	return []mistake{
		{"an origin's URL without a scheme", changes{"origins": with("url", "127.0.0.1:16031")}, "", "origins[0].url: ", "no scheme"},
		{"an origin's URL with a scheme of another kind", changes{"origins": with("url", "ftp://127.0.0.1:16031")}, "", "origins[0].url: ", "http://127.0.0.1:16031"},
		{"an origin's URL empty", changes{"origins": with("url", "")}, "", "origins[0].url: ", "is needed"},
		{"an origin's URL with a port out of range", changes{"origins": with("url", "http://127.0.0.1:70000")}, "", "origins[0].url: ", "65535"},
		{"an origin's peer address without a port", changes{"origins": with("peer", "127.0.0.1")}, "", "origins[0].peer: ", "host:port"},
		{"an origin without an id", changes{"origins": with("id", "")}, "", "origins[0].id: ", "is needed"},
		{"an origin's id twice", changes{"origins": []any{one, one}}, "", "origins[1].id: ", "origins[0]"},
		{"no origins", changes{"origins": []any{}}, "", "origins: ", "at least one"},
		{"this origin not among the origins", changes{"id": "origin-09"}, "origin", "id: ", "not among"},
		{"a password for whatever registry somebody names", changes{"upstreams": map[string]any{"registries": []any{map[string]any{
			"registry": "*", "credentials": map[string]any{"username": "u", "password": "p"}, "modes": []any{map[string]any{"repository": "**", "mode": "node"}},
		}}}}, "origin", "registries[0].credentials: ", "any host"},
		{"a URL without a scheme", changes{"build_index.url": "127.0.0.1:16010"}, "", "build_index.url: ", "no scheme"},
		{"a URL with a scheme of another kind", changes{"build_index.url": "ftp://127.0.0.1:16010"}, "", "build_index.url: ", "ftp"},
		{"a URL empty", changes{"build_index.url": ""}, "", "build_index.url: ", "is needed"},
		{"a tracker's URL empty", changes{"tracker.url": ""}, "", "tracker.url: ", "is needed"},
		{"a log level that there is not", changes{"log.level": "verbose"}, "", "log.level: ", "debug, info, warn or error"},
		{"a log format that there is not", changes{"log.format": "xml"}, "", "log.format: ", "text or json"},
		{"a port alone", changes{"server.listen": "16061"}, "", "server.listen: ", ":16061"},
		{"a port out of range", changes{"server.listen": "127.0.0.1:70000"}, "", "server.listen: ", "65535"},
		{"a URL with a password", changes{"build_index.url": "http://u:secret@h:1"}, "", "build_index.url: ", "want http://h:1"},
		{"no listener", changes{"server.listen": ""}, "", "server.listen: ", "is needed"},
		{"an admin port alone", changes{"admin.listen": "16061"}, "", "admin.listen: ", ":16061"},
		{"a peer port alone", changes{"peer.listen": "16061"}, "", "peer.listen: ", ":16061"},
		{"admin where server is", changes{"server.listen": "127.0.0.1:16000", "admin.listen": "127.0.0.1:16000"}, "", "admin.listen: ", "server.listen"},
		{"admin on a port of server's wildcard", changes{"server.listen": ":16000", "admin.listen": "127.0.0.1:16000"}, "", "admin.listen: ", "server.listen"},
		{"peer where server is", changes{"server.listen": "127.0.0.1:16000", "peer.listen": "127.0.0.1:16000"}, "", "peer.listen: ", "server.listen"},
		{"peers at no address that can be dialled", changes{"peer.listen": "0.0.0.0:16062"}, "agent", "peer.advertise: ", "is needed"},
		{"an interface that is not here", changes{"peer.advertise": "nosuch0"}, "agent", "peer.advertise: ", "nosuch0"},
		{"a listener's interface that is not here", changes{"server.advertise": "nosuch0"}, "", "server.advertise: ", "nosuch0"},
		{"a certificate that is missing", changes{"server.tls": tls("cert", f.missing, "key", f.key)}, "", "server.tls.cert: ", "no such file"},
		{"a key that is missing", changes{"server.tls": tls("cert", f.cert, "key", f.missing)}, "", "server.tls.key: ", "no such file"},
		{"a certificate without key", changes{"server.tls": tls("cert", f.cert)}, "", "server.tls.key: ", "is needed"},
		{"a key without certificate", changes{"server.tls": tls("key", f.key)}, "", "server.tls.cert: ", "is needed"},
		{"a key of another certificate", changes{"server.tls": tls("cert", f.cert, "key", f.otherKey)}, "", "server.tls.key: ", "belong together"},
		{"a certificate file that holds none", changes{"server.tls": tls("cert", f.text, "key", f.key)}, "", "server.tls.cert: ", "certificate"},
		{"an authority that holds no certificate", changes{"server.tls": tls("cert", f.cert, "key", f.key, "client_ca", f.text)}, "", "server.tls.client_ca: ", "no certificate"},
		{"an authority of a listener without TLS", changes{"server.tls": tls("client_ca", f.cert)}, "", "server.tls.cert: ", "client_ca"},
		{"an admin certificate without key", changes{"admin.tls": tls("cert", f.cert)}, "", "admin.tls.key: ", "is needed"},
		{"a client's authority that is missing", changes{"client.ca": f.missing}, "", "client.ca: ", "no such file"},
		{"a client's certificate without key", changes{"client.cert": f.cert}, "", "client.key: ", "is needed"},
		{"a client's key of another certificate", changes{"client.cert": f.cert, "client.key": f.otherKey}, "", "client.key: ", "belong together"},
		{"peers' TLS without authority", changes{"peer.stock_peers": false, "peer.tls": tls("cert", f.cert, "key", f.key)}, "", "peer.tls.ca: ", "is needed"},
		{"peers' TLS together with stock peers", changes{"peer.stock_peers": true, "peer.tls": tls("cert", f.cert, "key", f.key, "ca", f.cert)}, "", "peer.stock_peers: ", "not both"},
		{"a congestion control that there is not", changes{"server.congestion_control": "nosuch"}, "", "server.congestion_control: ", "nosuch"},
		{"a bucket with an unknown scheme", changes{"buckets": []any{bucket("a", "gopher://b")}}, "", "buckets[0].url: ", "gopher"},
		{"a bucket's folder that is relative", changes{"buckets": []any{bucket("a", "file://folder/b")}}, "", "buckets[0].url: ", "three slashes"},
		{"two buckets of one name", changes{"buckets": []any{bucket("a", "file:///b"), bucket("a", "file:///c")}}, "", "buckets[1].name: ", "buckets[0]"},
		{"a bucket without a URL", changes{"buckets": []any{bucket("a", "")}}, "", "buckets[0].url: ", "is needed"},
		{"an unknown parameter of a bucket", changes{"buckets": []any{bucket("a", "s3://b?regoin=x")}}, "", "buckets[0].url: ", "regoin"},
		{"no bucket", changes{"buckets": []any{}}, "", "buckets: ", "at least one"},
		{"no replicas, said so", changes{"replicas": 0}, "", "replicas: ", "is 0"},
		{"more replicas than origins", changes{"replicas": 4}, "", "replicas: ", "origins has 3"},
		{"more replicas than an upload can have", changes{"replicas": 6}, "", "replicas: ", "1..5"},
		{"an unknown key", changes{"nonsense": 1}, "", "nonsense: ", "unknown key"},
		{"an unknown key inside", changes{"server.lisen": ":1"}, "", "server.lisen: ", "unknown key"},
		{"a time below zero", changes{"server.drain_timeout": "-1s"}, "", "server.drain_timeout: ", "not negative"},
		{"a time of nothing", changes{"stall_timeout": "0s"}, "proxy", "stall_timeout: ", "is 0"},
		{"a size below zero", changes{"cache.capacity": "-1GiB"}, "", "cache.capacity: ", "size"},
		{"a rate below zero", changes{"peer.upload_rate": "-1Mbit/s"}, "", "peer", "rate"},
		{"a count below zero", changes{"leasers": -1}, "", "leasers: ", "0 or more"},
		{"a relative folder", changes{"dir": "var/lib"}, "", "dir: ", "absolute"},
		{"no folder", changes{"dir": ""}, "", "dir: ", "is needed"},
		{"a relative cache", changes{"cache.dir": "var/lib"}, "", "cache.dir: ", "absolute"},
		{"a relative database", changes{"database": "names.db"}, "", "database: ", "absolute"},
		{"a variable that is not set", changes{"node": "${KRAKEN_NO_SUCH_VARIABLE}"}, "", "node: ", "${KRAKEN_NO_SUCH_VARIABLE} is not set"},
		{"two origins at one URL", changes{"origins": []any{one, two}}, "", "origins[1].url: ", "origins[0]"},
		{"a URL with a path", changes{"build_index.url": "http://127.0.0.1:16010/v2/"}, "", "build_index.url: ", "nothing else"},
		{"a host's name that is a URL", changes{"server.hosts": []any{"http://metrics.example"}}, "", "server.hosts[0]: ", "Host header"},
		{"a record key that is none", changes{"record_keys": []any{"c2hvcnQ="}}, "", "record_keys[0]: ", "32 bytes in base64"},
		{"a record key's file that is missing", changes{"record_keys": []any{"file:" + f.missing}}, "", "record_keys[0]: ", "no such file"},
		{"a record key's file without a key", changes{"record_keys": []any{"file:" + f.text}}, "", "record_keys[0]: ", "no PEM public key"},
		{"a record key's file of another kind", changes{"record_keys": []any{"file:" + f.cert}}, "", "record_keys[0]: ", f.cert},
		{"a key of name records that is none", changes{"record_key_file": f.text}, "", "record_key_file: ", "no PEM private key"},
		{"a key of name records of another kind", changes{"record_key_file": f.key}, "", "record_key_file: ", "Ed25519"},
		{"a key of name records that is a folder", changes{"record_key_file": f.dir}, "", "record_key_file: ", "directory"},
		{"a relative key of name records", changes{"record_key_file": "record.key"}, "", "record_key_file: ", "absolute"},
		{"an upload key that is a folder", changes{"upload_key_file": f.dir}, "proxy", "upload_key_file: ", "directory"},
		{"an upload key that is too short", changes{"upload_key_file": f.text}, "proxy", "upload_key_file: ", "at least 32"},
		{"a folder that is a file", changes{"dir": f.text}, "", "dir: ", "is a file"},
		{"a cache that is a file", changes{"cache.dir": f.text}, "", "cache.dir: ", "is a file"},
		{"a database that is a folder", changes{"database": f.dir}, "", "database: ", "is a folder"},
		{"a bucket's pattern that is none", changes{"buckets": []any{withPattern("team/[")}}, "", "buckets[0].repositories: ", "regular expression"},
		{"a bucket's pattern of two halves", changes{"buckets": []any{withPattern("a)|(?:b")}}, "", "buckets[0].repositories: ", "regular expression"},
		{"a shell's pattern for repositories", changes{"repositories": []any{map[string]any{"match": "*"}}}, "", "repositories[0].match: ", "regular expression"},
		{"a policy without a pattern", changes{"repositories": []any{map[string]any{"references": "lax"}}}, "", "repositories[0].match: ", "is needed"},
		{"a pattern of tags that is none", changes{"repositories": []any{map[string]any{"match": ".*", "immutable_tags": "v[0-9"}}}, "", "repositories[0].immutable_tags: ", "regular expression"},
		{"a bucket's folder that is a file", changes{"buckets": []any{bucket("a", "file://"+f.text)}}, "", "buckets[0].url: ", "is a file"},
		{"a bucket in the origin's folder", changes{"dir": "/srv/kraken", "buckets": []any{bucket("a", "file:///srv/kraken/bucket")}}, "origin", "buckets[0].url: ", "one in the other"},
		{"the origin's folder in a bucket", changes{"dir": "/srv/kraken", "buckets": []any{bucket("a", "file:///srv")}}, "origin", "buckets[0].url: ", "one in the other"},
		{"a rate that would round to unlimited", changes{"peer.upload_rate": "1bit/s"}, "", "peer.upload_rate: ", "less than a byte"},
		{"an unknown parameter of a folder", changes{"buckets": []any{bucket("a", "file:///b?mod=0640")}}, "", "buckets[0].url: ", "mod"},
		{"an endpoint without a scheme", changes{"buckets": []any{bucket("a", "s3://b?endpoint=minio:9000")}}, "", "buckets[0].url: ", "http://host:port"},
		{"a yes that is no true", changes{"buckets": []any{bucket("a", "s3://b?use_path_style=yes")}}, "", "buckets[0].url: ", "true or false"},
		{"a registry's name that is a URL", changes{"names": []any{"https://registry.example"}}, "agent", "names[0]: ", "host:port"},
		{"no names", changes{"names": []any{}}, "agent", "names: ", "docker.io/library/nginx"},
		{"no names of the front door", changes{"names": []any{}}, "proxy", "names: ", "is needed"},
		{"Docker Hub's name for one's own", changes{"names": []any{"index.docker.io"}}, "agent", "names[0]: ", "Docker Hub"},
		{"a listener for Docker where the registry is", changes{"server.listen": "127.0.0.1:1", "docker_hub.listen": "127.0.0.1:1"}, "agent", "listen: ", "can't be bound beside"},
		{"a time without a unit", changes{"stall_timeout": "5"}, "proxy", "stall_timeout: ", "with a unit"},
		{"a size with a unit that there is not", changes{"cache.capacity": "100 gigs"}, "", "cache.capacity: ", "64MiB"},
		{"a water mark in percent", changes{"high_water": 95}, "", "high_water", "<= 1"},
		{"a pin that is no digest", changes{"pinned": []any{"library/alpine:3"}}, "", "pinned", "digest"},
		{"a text in the place of keys", changes{"server": "127.0.0.1:16000"}, "", "server: ", "want keys"},
		{"a list in the place of a text", changes{"server.listen": []any{":1"}}, "", "server.listen: ", "a list"},
	}
}

type mistake struct {
	name     string
	changes  changes
	role     string
	key, say string
}

type files struct{ cert, key, otherKey, text, dir, missing string }

func newFiles(t *testing.T) files {
	t.Helper()
	dir := t.TempDir()
	write := func(name, kind string, b []byte) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	pair := func(name string) (cert, key string) {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour)}
		der, err := x509.CreateCertificate(rand.Reader, c, c, &k.PublicKey, k)
		if err != nil {
			t.Fatal(err)
		}
		kb, err := x509.MarshalPKCS8PrivateKey(k)
		if err != nil {
			t.Fatal(err)
		}
		return write(name+".crt", "CERTIFICATE", der), write(name+".key", "PRIVATE KEY", kb)
	}
	f := files{missing: filepath.Join(dir, "missing.pem"), text: filepath.Join(dir, "text"), dir: dir}
	f.cert, f.key = pair("one")
	_, f.otherKey = pair("other")
	if err := os.WriteFile(f.text, []byte("no PEM\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return f
}

// TestMistakesAreRefused: --check refuses each mistake, for each role that has the key, and names the key.
func TestMistakesAreRefused(t *testing.T) {
	f := newFiles(t)
	for _, m := range mistakes(f) {
		tried := 0
		for _, name := range slices.Sorted(maps.Keys(commands())) {
			if m.role != "" && m.role != name {
				continue
			}
			cfg, ok := sample(t, name), true
			for path, v := range m.changes {
				ok = set(cfg, path, v) && ok
			}
			if !ok {
				continue
			}
			tried++
			path := filepath.Join(t.TempDir(), name+".yaml")
			b, err := yaml.Marshal(cfg)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			code, stdout, stderr := check(t, name, path)
			if code != 1 || stdout != "" || !strings.Contains(stderr, m.key) || !strings.Contains(stderr, m.say) || !strings.Contains(stderr, path) {
				t.Errorf("%s, %s: exit code %d, stdout %q, stderr %q; want 1 and the key %q and %q", name, m.name, code, stdout, stderr, m.key, m.say)
			}
		}
		if tried == 0 {
			t.Errorf("%s: no role has the keys %v", m.name, m.changes)
		}
	}
}

func sample(t *testing.T, name string) map[string]any {
	t.Helper()
	b, err := os.ReadFile(name + ".yaml")
	if err != nil {
		t.Fatal(err)
	}
	var cfg map[string]any
	if err := yaml.Unmarshal(b, &cfg); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// TestSamplesAreOK: what the samples say stands, and --check says so on stdout alone.
func TestSamplesAreOK(t *testing.T) {
	for name := range commands() {
		code, stdout, stderr := check(t, name, name+".yaml")
		if code != 0 || stdout != "ok\n" || stderr != "" {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q", name, code, stdout, stderr)
		}
	}
}

// TestAllMistakesAtOnce: one reading tells everything, in the order of the lines, and nothing twice.
func TestAllMistakesAtOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "proxy.yaml")
	text := "server: {listen: \"16000\"}\nlog:\n  level: verbose\n  colour: red\norigins:\n  - {id: a, url: \"http://a:1\"}\n  - {id: a, url: b}\nreplicas: many\nnames: [a]\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	code, _, stderr := check(t, "proxy", path)
	lines := strings.Split(strings.TrimSpace(stderr), "\n")
	want := []string{
		"7 mistakes", "build_index.url", "line 1: server.listen", "line 3: log.level", "line 4: log.colour", "line 7: origins[1].id", "line 7: origins[1].url",
		"line 8: replicas",
	}
	if code != 1 || len(lines) != len(want) {
		t.Fatalf("exit code %d, %s", code, stderr)
	}
	for i, w := range want {
		if !strings.Contains(lines[i], w) {
			t.Errorf("line %d is %q, want %q in it", i, lines[i], w)
		}
	}
}

// TestOneFileForAllNodes: what differs from node to node comes from the environment.
func TestOneFileForAllNodes(t *testing.T) {
	cfg := sample(t, "agent")
	for k, v := range map[string]any{"node": "${NODE_NAME}", "cache.dir": "${STATE}/agent", "replicas": "${REPLICAS}", "peer.link_rate": "${LINK}"} {
		set(cfg, k, v)
	}
	for k, v := range map[string]string{"NODE_NAME": "n1\"\nserver: {listen: evil}", "STATE": "/var/lib", "REPLICAS": "3", "LINK": "1Gbit/s"} {
		t.Setenv(k, v)
	}
	b, err := yaml.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "agent.yaml")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := check(t, "agent", path); code != 0 {
		t.Error(fmt.Sprint(stderr))
	}
}

// TestFilesOfNoSense: what is no YAML, or says a thing twice, is refused with its place.
func TestFilesOfNoSense(t *testing.T) {
	for name, tc := range map[string]struct{ text, say string }{
		"a tab before a key":  {"log:\n\tlevel: info\n", "2:1"},
		"a key twice":         {"log: {level: info}\nlog: {level: debug}\n", "log"},
		"a key inside twice":  {"log:\n  level: info\n  level: debug\n", "level"},
		"an open bracket":     {"origins: [\n", "origins"},
		"a list of keys":      {"- log: {level: info}\n", "want keys"},
		"an alias of nothing": {"log: *common\n", "*common"},
	} {
		path := filepath.Join(t.TempDir(), "tracker.yaml")
		if err := os.WriteFile(path, []byte(tc.text), 0o600); err != nil {
			t.Fatal(err)
		}
		code, stdout, stderr := check(t, "tracker", path)
		if code != 1 || stdout != "" || !strings.Contains(stderr, path) || !strings.Contains(stderr, tc.say) {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q; want 1 and %q", name, code, stdout, stderr, tc.say)
		}
	}
}
