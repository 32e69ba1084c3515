package dashboard

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"kraken/proto/ring"
)

func render(t *testing.T, s *Snapshot) string {
	t.Helper()
	b, err := Render(s)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestEscaped: names come from announcers, and none of them is markup.
func TestEscaped(t *testing.T) {
	const evil = `"><script>alert(1)</script>{{.}}`
	got := render(t, &Snapshot{
		Time: time.Unix(0, 0), SwarmCount: 1, NodeCount: 1, StockPeers: true,
		Swarms:  []Swarm{{Digest: evil, InfoHash: evil, Seeds: 1}},
		Nodes:   []Node{{Name: evil, PeerID: evil, Addr: []string{evil}, Held: []Held{{Digest: evil}}, Fetches: []Held{{Digest: evil}}}},
		Origins: []ring.Member{{ID: evil, URL: evil, Peer: evil}},
	})
	if strings.Contains(got, "<script") || strings.Contains(got, `"">`) {
		t.Error("what an announcer says became markup")
	}
	if !strings.Contains(got, "&lt;script&gt;") {
		t.Error("and it is not shown either")
	}
}

func TestEmptySaysWhatToDo(t *testing.T) {
	got := render(t, &Snapshot{Interval: 10})
	for _, want := range []string{"No swarm yet", "pull it from an agent", "No node has announced", "tracker.url", "within 10 s"} {
		if !strings.Contains(got, want) {
			t.Errorf("the empty page lacks %q", want)
		}
	}
}

func TestRestIsCounted(t *testing.T) {
	got := render(t, &Snapshot{
		SwarmCount: 7, NodeCount: 5, Swarms: []Swarm{{Digest: "sha256:aa"}},
		Nodes: []Node{{Name: "n", Seeding: 12, Held: make([]Held, 8), Fetching: 3, Fetches: make([]Held, 1)}},
	})
	for _, want := range []string{"and 6 more", "and 4 more", "+4 complete", "+2 being fetched"} {
		if !strings.Contains(got, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	if strings.Contains(render(t, &Snapshot{SwarmCount: 1, NodeCount: 1, Swarms: make([]Swarm, 1), Nodes: make([]Node, 1)}), "more") {
		t.Error("everything is shown, and the page says that there is more")
	}
}

func TestWords(t *testing.T) {
	for in, want := range map[float64]string{0: "0 s", 59.9: "59 s", 60: "1 m 0 s", 3599: "59 m 59 s", 3600: "1 h 0 m", 90_000: "1 d 1 h", -1: "0 s"} {
		if got := seconds(in); got != want {
			t.Errorf("seconds(%v) = %q, want %q", in, got, want)
		}
	}
	for in, want := range map[float64]int{0: 0, 0.5: 50, 0.9999: 99, 1: 100, 2: 100, -1: 0} {
		if got := percent(in); got != want {
			t.Errorf("percent(%v) = %d, want %d", in, got, want)
		}
	}
	for in, want := range map[int64]string{0: "–", -1: "–", 1 << 20: "1.0 MiB", 1 << 30: "1.0 GiB"} {
		if got := size(in); got != want {
			t.Errorf("size(%d) = %q, want %q", in, got, want)
		}
	}
	for in, want := range map[string]string{"sha256:0123456789abcdef": "0123456789ab", "0123": "0123", "": ""} {
		if got := short(in); got != want {
			t.Errorf("short(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestNoScriptNeeded(t *testing.T) {
	if bytes.Contains([]byte(page), []byte("<script")) || !strings.Contains(page, `http-equiv="refresh"`) {
		t.Error("the page refreshes itself without a script")
	}
}
