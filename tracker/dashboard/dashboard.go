// Package dashboard is the tracker's page for operators: what the swarms do now, in HTML that refreshes itself without
// a script, and the same as JSON. It only shows a Snapshot; what goes into one is the tracker's business.
package dashboard

import (
	"bytes"
	_ "embed"
	"fmt"
	"html/template"
	"strings"
	"time"

	"kraken/proto/config"

	"kraken/proto/ring"
)

// Snapshot is the cluster as the tracker knows it. Its JSON is GET /swarms. Rows are bounded; the counts are of all.
type Snapshot struct {
	Time       time.Time `json:"time"`
	Interval   float64   `json:"interval_seconds"` // between two announces of a peer: how old what is shown may be
	StockPeers bool      `json:"stock_peers"`
	Page       int       `json:"page"`  // of Swarms and Nodes, from 1
	Pages      int       `json:"pages"` // that can be asked for
	SwarmCount int       `json:"swarm_count"`
	NodeCount  int       `json:"node_count"`
	Seeds      int       `json:"seeds"`    // pairs of a node and a blob that it has whole
	Leechers   int       `json:"leechers"` // pairs of a node and a blob that it is fetching
	Bytes      int64     `json:"bytes"`    // of all swarms' blobs, each once
	Swarms     []Swarm   `json:"swarms"`   // busy ones first
	Nodes      []Node    `json:"nodes"`    // by name
	// Origins are the configured ones. They don't announce: they own every blob.
	Origins []ring.Member `json:"origins"`
}

// Swarm is one blob that at least one node has some of.
type Swarm struct {
	Digest   string  `json:"digest"`
	InfoHash string  `json:"info_hash,omitempty"` // 40 hex digits, empty while nobody asked for the metainfo
	Size     int64   `json:"size"`                // bytes, 0 when not known
	Seeds    int     `json:"seeds"`
	Leechers int     `json:"leechers"`
	Progress float64 `json:"progress"` // mean of all nodes in the swarm, 0 to 1
	Age      float64 `json:"age_seconds"`
}

// Node is one peer.
type Node struct {
	Name       string   `json:"name,omitempty"`
	PeerID     string   `json:"peer_id"` // 40 hex digits
	Addr       []string `json:"addr"`
	Stock      bool     `json:"stock,omitempty"` // a BitTorrent client other than an agent
	Seeding    int      `json:"seeding"`         // blobs that it has whole
	Fetching   int      `json:"fetching"`
	Bytes      int64    `json:"bytes"` // of the blobs that it has whole
	Uploaded   int64    `json:"uploaded"`
	Downloaded int64    `json:"downloaded"`
	LastSeen   float64  `json:"last_seen_seconds"`
	Held       []Held   `json:"held,omitempty"`    // some of the blobs that it has whole
	Fetches    []Held   `json:"fetches,omitempty"` // some of those that it is fetching
}

// Held is what a node has of one blob.
type Held struct {
	Digest   string  `json:"digest"`
	Size     int64   `json:"size"`
	Progress float64 `json:"progress"`
}

//go:embed page.html
var page string

var pageTemplate = template.Must(template.New("page").Funcs(template.FuncMap{
	"size": size, "short": short, "seconds": seconds, "percent": percent, "clock": clock, "minus": func(a, b int) int { return a - b }, "plus": func(a, b int) int { return a + b },
}).Parse(page))

// Render is the page.
func Render(s *Snapshot) ([]byte, error) {
	var b bytes.Buffer
	if err := pageTemplate.Execute(&b, s); err != nil {
		return nil, fmt.Errorf("dashboard: %w", err)
	}
	return b.Bytes(), nil
}

// size is a number of bytes for people; an unknown one is a dash.
func size(n int64) string {
	if n <= 0 {
		return "–"
	}
	return config.Size(n).String()
}

// short is the part of a digest that people compare: the first 12 hex digits.
func short(digest string) string {
	_, hex, found := strings.Cut(digest, ":")
	if !found {
		hex = digest
	}
	return hex[:min(12, len(hex))]
}

// seconds is a time span for people, in its largest two units.
func seconds(s float64) string {
	d := time.Duration(max(0, s)) * time.Second
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d m %d s", int(d.Minutes()), int(d.Seconds())%60)
	case d < 24*time.Hour:
		return fmt.Sprintf("%d h %d m", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%d d %d h", int(d.Hours())/24, int(d.Hours())%24)
}

// percent never shows 100 before it is.
func percent(part float64) int { return int(max(0, min(1, part)) * 100) }

func clock(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }
