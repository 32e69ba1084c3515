// Package config holds the commented sample of every role's configuration, which is the reference, and sees that each
// loads.
package config

import (
	"os"
	"strings"
	"testing"

	"kraken/agent"
	"kraken/buildindex"
	"kraken/origin"
	"kraken/proto/access"
	"kraken/proto/config"
	"kraken/proxy"
	"kraken/tracker"
)

func samples() map[string]any {
	return map[string]any{
		"agent.yaml": &agent.Config{}, "build-index.yaml": &buildindex.Config{}, "origin.yaml": &origin.Config{},
		"proxy.yaml": &proxy.Config{}, "tracker.yaml": &tracker.Config{}, "access.yaml": &access.Policy{},
	}
}

func TestSamplesLoad(t *testing.T) {
	for file, into := range samples() {
		if err := config.Load(file, into); err != nil {
			t.Errorf("%s: %v", file, err)
		}
	}
	es, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range es {
		if strings.HasSuffix(e.Name(), ".yaml") && samples()[e.Name()] == nil {
			t.Errorf("%s is loaded by no test", e.Name())
		}
	}
}

// The production samples load where the environment and the files that they name are; test/abuse starts a cluster of
// them. Here: they know no key that the commented ones lack, take no stranger into the swarm, and speak TLS everywhere.
func TestProductionSamplesHideNothing(t *testing.T) {
	for file := range samples() {
		if file == "access.yaml" {
			continue // of no listener: production has the same one
		}
		b, err := os.ReadFile("production/" + file)
		if err != nil {
			t.Error(err)
			continue
		}
		for _, word := range []string{"stock_peers", "http://", "open: true", "pprof: true"} {
			if strings.Contains(string(b), word) {
				t.Errorf("production/%s has %s", file, word)
			}
		}
		if !strings.Contains(string(b), "client_ca:") || !strings.Contains(string(b), "cluster: prod") {
			t.Errorf("production/%s does not ask for certificates that name their holders", file)
		}
	}
}

func TestUnknownKeysAreRefused(t *testing.T) {
	for file, into := range samples() {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Error(err)
			continue
		}
		err = config.Decode(file, strings.NewReader(string(b)+"\nno_such_key: 1\n"), into)
		if err == nil || !strings.Contains(err.Error(), "no_such_key") || !strings.Contains(err.Error(), file) {
			t.Errorf("%s with an unknown key: %v, want an error that names the key and the file", file, err)
		}
	}
}
