package abuse

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"kraken/deploy/devcluster"
	"kraken/proto/announce"
	"kraken/proto/cluster"
	"kraken/proto/transport"
)

// TestRights meets each row of the table with a certificate of each role at the role's own process: who is not in the
// row gets a 403 that says so, and who is in it does not.
func TestRights(t *testing.T) {
	c := sharedTLS(t)
	at := map[string]string{"origin": c.Origins[0].URL, "build-index": c.BuildIndex.URL, "tracker": c.Tracker.URL}
	clients := map[transport.Role]*http.Client{}
	for _, role := range transport.Roles {
		clients[role] = c.clientOf(t, string(role)+"-77")
	}
	d := digest.FromString("rights: nobody has this")
	names := strings.NewReplacer("<name>", "rights/app", "<digest>", d.String(), "<session>", "00000000-0000-4000-8000-000000000000", "<reference>", "v1")
	keyed := []string{"blobs", "debt", "metainfo", "arriving", "verify", "lease", "layers", "mount"}
	met := 0
	for _, row := range cluster.Rights {
		base := at[row.At]
		if base == "" {
			continue // proxies and agents take clients without a certificate, admin listeners are on loopback
		}
		path := names.Replace(row.Path)
		if name, resource, ok := strings.Cut(path, "/_kraken/"); ok && name != "/v2" {
			switch {
			case slices.Contains(keyed, resource):
				path += "/" + d.String()
			case resource == "names":
				path += "/" + strings.Repeat("0", 64)
			}
		}
		for _, method := range strings.Fields(row.Methods) {
			for role, hc := range clients {
				a := do(t, hc, method, base, path, nil)
				refused := a.status == http.StatusForbidden && strings.Contains(string(a.body), "a certificate of the role "+string(role))
				if refused == slices.Contains(row.Roles, role) {
					t.Errorf("%s %s at %s by %s: %d %.300s", method, path, row.At, role, a.status, a.body)
				}
				met++
			}
		}
	}
	if met < 200 {
		t.Errorf("only %d requests were made", met)
	}
}

// TestCompromisedNode does with one agent's certificate, by hand, what its holder must not: nothing of it happens. What
// an agent is for works with it.
func TestCompromisedNode(t *testing.T) {
	c := sharedTLS(t)
	layer := random(300 << 10)
	manifest := push(t, c.client(t), c.Proxy.URL, "node/app", "v1", layer)
	node := c.clientOf(t, "agent-01")
	d, dm := digest.FromBytes(layer), digest.FromBytes(manifest)
	blob := "/v2/node/app/blobs/" + d.String()
	x := "/v2/node/app/_kraken/"
	record, err := json.Marshal(forged("node/app", "v1", []byte("{}")))
	if err != nil {
		t.Fatal(err)
	}
	self := transport.Principal{Cluster: devcluster.ClusterName, Role: transport.RoleAgent, ID: "agent-01"}
	for name, f := range map[string]struct {
		method, base, path string
		body               []byte
	}{
		"push a blob":                  {"POST", c.Origins[0].URL, "/v2/node/app/blobs/uploads/?digest=" + digest.FromString("evil").String(), []byte("evil")},
		"begin an upload":              {"POST", c.Origins[0].URL, "/v2/node/app/blobs/uploads/", nil},
		"replicate a blob":             {"PUT", c.Origins[0].URL, x + "blobs/" + digest.FromString("evil").String(), []byte("evil")},
		"delete a blob":                {"DELETE", c.Origins[0].URL, blob, nil},
		"make an origin owe":           {"PUT", c.Origins[0].URL, x + "debt/" + d.String(), []byte(`{"repositories":["a","b"]}`)},
		"drop metainfo":                {"DELETE", c.Origins[0].URL, x + "metainfo/" + d.String(), nil},
		"write a record of a name":     {"PUT", c.Origins[0].URL, x + "names/" + cluster.NameKey(forged("node/app", "v1", []byte("{}"))), record},
		"forget a record":              {"DELETE", c.Origins[0].URL, x + "names/" + strings.Repeat("0", 64) + "?generation=9", nil},
		"list the names":               {"GET", c.Origins[0].URL, "/v2/_kraken/names", nil},
		"list what is pending":         {"GET", c.Origins[0].URL, "/v2/_kraken/pending", nil},
		"be the build-index":           {"PUT", c.Origins[0].URL, "/v2/_kraken/holder", []byte(`{"holder":"evil","for_ns":60000000000}`)},
		"ask what is durable":          {"POST", c.Origins[0].URL, x + "durable", []byte(`{}`)},
		"overwrite a tag":              {"PUT", c.BuildIndex.URL, "/v2/node/app/manifests/v1", manifest},
		"delete a tag":                 {"DELETE", c.BuildIndex.URL, "/v2/node/app/manifests/v1", nil},
		"delete a manifest":            {"DELETE", c.BuildIndex.URL, "/v2/node/app/manifests/" + dm.String(), nil},
		"list the repositories":        {"GET", c.BuildIndex.URL, "/v2/_catalog", nil},
		"make a member":                {"PUT", c.BuildIndex.URL, x + "layers/" + d.String(), fmt.Appendf(nil, `{"digest":%q,"size":1}`, d)},
		"end a membership":             {"DELETE", c.BuildIndex.URL, x + "layers/" + d.String(), nil},
		"mount":                        {"POST", c.BuildIndex.URL, x + "mount/" + d.String(), nil},
		"see who has what":             {"GET", c.Tracker.URL, "/swarms", nil},
		"see the page":                 {"GET", c.Tracker.URL, "/", nil},
		"announce as a stock client":   {"GET", c.Tracker.URL, "/announce?port=9999", nil},
		"announce under another id":    {"POST", c.Tracker.URL, "/announce", announcement(announce.PeerID([]byte("-KN0001-123456789abc")), d)},
		"announce as another node":     {"POST", c.Tracker.URL, "/announce", announcement(announce.PeerIDOf(transport.Principal{Cluster: self.Cluster, Role: self.Role, ID: "agent-02"}), d)},
		"announce as a plain old peer": {"POST", c.Tracker.URL, "/announce", announcement(announce.PeerID([]byte("-qB4500-123456789abc")), d)},
	} {
		if a := do(t, node, f.method, f.base, f.path, f.body, "Content-Type", manifestType); a.status != http.StatusForbidden {
			t.Errorf("%s: %d %.300s", name, a.status, a.body)
		}
	}
	for name, f := range map[string]struct {
		method, base, path string
		body               []byte
		want               int
	}{
		"pull a manifest":   {"GET", c.BuildIndex.URL, "/v2/node/app/manifests/v1", nil, 200},
		"pull a blob":       {"GET", c.Origins[0].URL, blob, nil, 200},
		"complain of bytes": {"POST", c.Origins[0].URL, x + "verify/" + digest.FromString("rights: nobody has this").String(), nil, 404},
		"announce itself":   {"POST", c.Tracker.URL, "/announce", announcement(announce.PeerIDOf(self), d), 200},
	} {
		if a := do(t, node, f.method, f.base, f.path, f.body); a.status != f.want {
			t.Errorf("%s: %d %.300s", name, a.status, a.body)
		}
	}
	if got, layers := pull(t, c.client(t), c.Agents[1].URL, "node/app", "v1"); string(got) != string(manifest) || string(layers[0]) != string(layer) {
		t.Error("another image is pulled than was pushed")
	}
}

// announcement is the body of an announce of one blob.
func announcement(id announce.PeerID, d digest.Digest) []byte {
	b, err := json.Marshal(announce.Request{
		Version: announce.Version, Peer: announce.Peer{ID: hex.EncodeToString(id[:]), Addr: []string{"127.0.0.1:16999"}},
		Blobs: []announce.BlobState{{Digest: d, Repository: "node/app", Want: true, Size: 300 << 10}},
	})
	if err != nil {
		panic(err)
	}
	return b
}
