package origin

import (
	"testing"

	"kraken/origin/bucket"
	"kraken/proto/ring"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// TestCongestionControlDefault: agents read from an origin beside many peers, so it is "auto" unless the operator
// chose.
func TestCongestionControlDefault(t *testing.T) {
	for set, want := range map[string]string{"": "auto", "system": "system", "reno": "reno"} {
		c := Config{
			ID: "origin-01", Dir: "/nowhere", Peer: Peer{Listen: "127.0.0.1:0"},
			Config:  role.Config{Server: transport.ServerConfig{Listen: "127.0.0.1:0", CongestionControl: set}, Origins: []ring.Member{{ID: "origin-01", URL: "http://127.0.0.1:1"}}},
			Buckets: []bucket.Config{{Name: "b", URL: "mem://"}},
		}
		if err := c.Validate(); err != nil || c.Server.CongestionControl != want {
			t.Errorf("%q became %q, %v, want %q", set, c.Server.CongestionControl, err, want)
		}
	}
}
