package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"kraken/test/netns"
)

// draw writes the progress of each node over time as an SVG: what its link has received, as a share of the blob.
func (b *bench) draw(name string, s *sampler, n *netns.Network, size int64) error {
	const width, height, margin = 720, 400, 45
	if len(s.at) < 2 {
		return nil
	}
	// Nothing changes after the last byte.
	last := len(s.at) - 1
	end := max(s.at[last], time.Second).Seconds()
	x := func(at time.Duration) float64 { return margin + at.Seconds()/end*(width-2*margin) }
	top := 1.0
	share := func(i int, node string) float64 {
		return float64(s.seen[i][node].Received-s.seen[0][node].Received) / float64(size)
	}
	for _, node := range n.Nodes[1:] {
		top = max(top, share(last, node.Name))
	}
	y := func(v float64) float64 { return height - margin - v/top*(height-2*margin) }
	var out strings.Builder
	fmt.Fprintf(&out, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`, width, height)
	fmt.Fprintf(&out, `<rect width="100%%" height="100%%" fill="white"/><text x="%d" y="20">%s: received by each node, copies of the blob, over seconds</text>`, margin, name)
	for k := range 6 {
		v := float64(k) / 5
		fmt.Fprintf(&out, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#ddd"/><text x="8" y="%.1f">%.1f</text>`, margin, width-margin, y(v*top), y(v*top), y(v*top)+4, v*top)
		fmt.Fprintf(&out, `<text x="%.1f" y="%d" text-anchor="middle">%.0f</text>`, margin+v*(width-2*margin), height-margin+18, v*end)
	}
	for k, node := range slices.Backward(n.Nodes[1:]) {
		color := fmt.Sprintf("hsl(%d 70%% 45%%)", k*360/len(n.Nodes))
		if node.Name == "origin-01" {
			color = "black"
		}
		var points []string
		for i := range s.at {
			points = append(points, fmt.Sprintf("%.1f,%.1f", x(s.at[i]), y(share(i, node.Name))))
		}
		fmt.Fprintf(&out, `<polyline fill="none" stroke="%s" stroke-width="1.5" points="%s"><title>%s</title></polyline>`, color, strings.Join(points, " "), node.Name)
	}
	out.WriteString("</svg>\n")
	return os.WriteFile(filepath.Join(b.out, "swarm-"+name+".svg"), []byte(out.String()), 0o644)
}
