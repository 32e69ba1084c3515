package tracker

import (
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/config"
	"kraken/proto/ring"
	"kraken/proto/role"
)

func TestConfig(t *testing.T) {
	var sample Config
	if err := config.Load(filepath.Join("..", "deploy", "config", "tracker.yaml"), &sample); err != nil {
		t.Fatal(err)
	}
	var defaults Config
	defaults.Server.Listen, defaults.Origins = "127.0.0.1:16020", sample.Origins
	if err := defaults.Validate(); err != nil {
		t.Fatal(err)
	}
	if sample.Interval != defaults.Interval || sample.PeersPerAnswer != defaults.PeersPerAnswer || sample.MetainfoMemory != defaults.MetainfoMemory || sample.Limits != defaults.Limits || sample.Replicas != defaults.Replicas {
		t.Errorf("the sample says other defaults:\n%+v\n%+v", sample, defaults)
	}
	minimal := "server: {listen: '127.0.0.1:0'}\norigins: [{id: o, url: 'http://o', peer: 'o:1'}]\n"
	for name, c := range map[string]struct{ add, want string }{
		"nothing more":      {"", ""},
		"unknown key":       {"stock_peer: true", "stock_peer"},
		"too short":         {"interval: 10ms", "interval"},
		"too long":          {"interval: 1h", "interval"},
		"too many peers":    {"peers_per_answer: 1000", "peers_per_answer"},
		"negative limit":    {"limits: {pairs: -1}", "limits"},
		"negative replicas": {"replicas: -1", "replicas"},
	} {
		err := config.Decode(name, strings.NewReader(minimal+c.add), new(Config))
		if (c.want == "") != (err == nil) || (err != nil && !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want one that names %q", name, err, c.want)
		}
	}
	for name, text := range map[string]string{
		"server.listen": "origins: [{id: o, url: 'http://o'}]", "origins": "server: {listen: ':0'}",
		"twice": "server: {listen: ':0'}\norigins: [{id: o, url: 'http://o'}, {id: o, url: 'http://p'}]",
		"peer":  "server: {listen: ':0'}\nstock_peers: true\norigins: [{id: o, url: 'http://o'}]",
		"url":   "server: {listen: ':0'}\norigins: [{id: o}]",
	} {
		if err := config.Decode("x", strings.NewReader(text), new(Config)); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNewRollsBack(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	var last error
	for range 5 { // what is free now may be another process's a moment later
		free, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		var cfg Config
		cfg.Origins = []ring.Member{{ID: "o", URL: "http://127.0.0.1:1"}}
		cfg.Server.Listen, cfg.Admin.Listen = free.Addr().String(), taken.Addr().String()
		if err := free.Close(); err != nil {
			t.Fatal(err)
		}
		_, err = New(cfg, role.Deps{Log: slog.New(slog.DiscardHandler), Registry: prometheus.NewRegistry()})
		if err == nil || !strings.Contains(err.Error(), "admin") {
			last = fmt.Errorf("a taken admin port: %w", err)
			continue
		}
		again, err := net.Listen("tcp", cfg.Server.Listen)
		if err == nil {
			again.Close()
			return
		}
		last = fmt.Errorf("the main listener was left open: %w", err)
	}
	t.Error(last)
}
