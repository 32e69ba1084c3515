package swarm

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// An ordinary BitTorrent client downloads from a node, every byte by the peer protocol, in plain and with an obfuscated
// handshake (MSE), although the node has no torrent for the blob when it comes. One of ours, whose blocks are sent
// another way, downloads beside it.
func TestStockClientDownloads(t *testing.T) {
	aria2c, err := exec.LookPath("aria2c")
	if err != nil {
		if os.Getenv("KRAKEN_TEST_REQUIRE") == "1" {
			t.Fatal("aria2c is not installed: test/setup.sh gcc does it")
		}
		t.Skip("aria2c is not installed")
	}
	b := randomBytes(50, 9<<20+7)
	for name, args := range map[string][]string{
		"plain":      nil,
		"obfuscated": {"--bt-require-crypto=true", "--bt-min-crypto-level=arc4"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, func(c *Config) { c.StockPeers = true })
			m := n.seed(b)
			tracker := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				ip := n.Addr().Addr().As4()
				peers := binary.BigEndian.AppendUint16(ip[:], n.Addr().Port())
				fmt.Fprintf(w, "d8:intervali5e5:peers%d:%se", len(peers), peers)
			}))
			defer tracker.Close()
			dir := t.TempDir()
			file := filepath.Join(dir, "blob.torrent")
			if err := os.WriteFile(file, m.Torrent(tracker.URL+"/announce", nil), 0o644); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, aria2c, append([]string{"--no-conf", "--dir", dir, "--seed-time=0", "--enable-dht=false", "--enable-dht6=false",
				"--bt-enable-lpd=false", "--enable-peer-exchange=false", "--listen-port=20000-40000", "--summary-interval=0", "--console-log-level=info"}, append(args, file)...)...)
			ours := newNode(t, nil)
			d := ours.fetch(m, nil, n.peer())
			out, err := cmd.CombinedOutput()
			d.finish()
			ours.has(b)
			if err != nil {
				t.Fatalf("%v: %s", err, out[max(0, len(out)-8<<10):])
			}
			got, err := os.ReadFile(filepath.Join(dir, m.Digest.Encoded()))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, b) {
				t.Error("it has other bytes")
			}
			if sent := n.client.ConnStats(); sent.BytesWrittenData.Int64() < 2*m.Size {
				t.Errorf("the node sent %d bytes to two peers of %d bytes", sent.BytesWrittenData.Int64(), m.Size)
			}
		})
	}
}
