package abuse

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"kraken/proto/blob"
)

// garbage is what somebody sends who is no client of ours.
type garbage struct {
	name   string
	send   []byte
	half   bool // the request is not whole: no answer is right, too
	may    int  // another status than 4xx that is right
	closes bool // the sending half is shut after it
}

// TestGarbage throws garbage at every listener of every role, plain and with mutual TLS. Each is answered by a 4xx or
// by closing the connection; no process ends, grows, or keeps a descriptor or a goroutine of it.
func TestGarbage(t *testing.T) {
	t.Run("plain", func(t *testing.T) { throw(t, start(t, options{agents: 1})) })
	t.Run("mutual TLS", func(t *testing.T) { throw(t, start(t, options{agents: 1, mutualTLS: true})) })
}

// thief names whose key was stolen, say: a node that may ask p for more than others.
func thief(p *process) string {
	if p.Role == "tracker" {
		return "agent-01"
	}
	return "proxy-01"
}

func throw(t *testing.T, c *system) {
	content := random(300 << 10)
	push(t, c.client(t), c.Proxy.URL, "some/app", "v1", content)
	targets := []*process{c.Proxy, c.BuildIndex, c.Tracker, c.Origins[0], c.Agents[0]}
	before := map[string]usage{}
	for _, p := range targets {
		before[p.Name] = usageOf(t, p)
	}
	peers := peerGarbage(c.metainfo(t, "some/app", content))
	for _, p := range targets {
		var cfg *tls.Config
		if c.plan.MutualTLS && p.Role != "agent" {
			cfg = c.tls(t, thief(p))
		}
		all := append(malformed(p.Addr), odd(p.Addr)...)
		all = append(all, bodies(t, c, p)...)
		fire(t, p, p.Addr, cfg, all)
		fire(t, p, p.Admin, nil, append(malformed(p.Admin), odd(p.Admin)...))
		if cfg != nil {
			fire(t, p, p.Addr, nil, noTLS(false))
		}
		if p.Peer != "" {
			fire(t, p, p.Peer, nil, peers)
			fire(t, p, p.Peer, nil, noTLS(!c.plan.MutualTLS))
		}
	}
	for _, p := range targets {
		eventually(t, 20*time.Second, func() error { return usageOf(t, p).over(before[p.Name]) })
	}
	if _, layers := pull(t, c.client(t), c.Agents[0].URL, "some/app", "v1"); !bytes.Equal(layers[0], content) {
		t.Error("the image is another one afterwards")
	}
}

// usage is what garbage could leave behind.
type usage struct {
	pid, descriptors int
	goroutines       float64
	memory           int64
}

func usageOf(t *testing.T, p *process) usage {
	t.Helper()
	p.alive(t)
	return usage{p.PID(), p.descriptors(t), p.metric(t, "go_goroutines"), p.rss(t)}
}

// over says what u has more of than before, but for what comes and goes with work in the background.
func (u usage) over(before usage) error {
	switch {
	case u.pid != before.pid:
		return fmt.Errorf("another process: %d, was %d", u.pid, before.pid)
	case u.descriptors > before.descriptors+20, u.goroutines > before.goroutines+40, u.memory > before.memory+64<<20:
		return fmt.Errorf("%+v, was %+v", u, before)
	}
	return nil
}

// fire sends each at an address of p, a few at a time, and checks the answers and that p lives.
func fire(t *testing.T, p *process, addr string, cfg *tls.Config, all []garbage) {
	t.Helper()
	slots := make(chan struct{}, 8)
	var wg sync.WaitGroup
	for _, g := range all {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			patience := 5 * time.Second
			if g.half {
				patience = 300 * time.Millisecond
			}
			got, closed := raw(t, addr, cfg, patience, g.closes, g.send)
			status := statusOf(got)
			switch {
			case status >= 400 && status < 500, status != 0 && status == g.may:
			case status == http.StatusTemporaryRedirect && bytes.Contains(got, []byte("\r\nLocation: /")) && !bytes.Contains(got, []byte("\r\nLocation: //")):
				// to the same path without dot segments, as net/http's router does
			case status == 0 && (closed || g.half):
			default:
				t.Errorf("%s at %s, %s: status %d, closed %v: %.200q", p.Name, addr, g.name, status, closed, got)
			}
		})
	}
	wg.Wait()
	p.alive(t)
}

func fill(n int, s string) string { return strings.Repeat(s, n) }

// malformed is what is no request of HTTP/1.1.
func malformed(host string) []garbage {
	head := "Host: " + host + "\r\nConnection: close\r\n"
	many := &strings.Builder{}
	for i := range 10_000 {
		fmt.Fprintf(many, "X-%d: %d\r\n", i, i)
	}
	of := func(name, s string) garbage { return garbage{name: name, send: []byte(s)} }
	silent := func(name, s string) garbage { return garbage{name: name, send: []byte(s), half: true} }
	out := []garbage{
		{name: "random bytes", send: random(64 << 10)}, of("zeros", fill(4096, "\x00")+"\r\n\r\n"), of("a line of 1 MiB", fill(1<<20, "a")),
		silent("nothing", ""), silent("half a request line", "GET /v2/ HT"), silent("half a header", "GET /v2/ HTTP/1.1\r\nHost: x\r\nX-A: "),
		of("HTTP/0.9", "GET /v2/\r\n\r\n"), of("a header of 1 MiB", "GET /v2/ HTTP/1.1\r\n"+head+"X-A: "+fill(1<<20, "a")+"\r\n\r\n"),
		of("10,000 headers", "GET /v2/ HTTP/1.1\r\n"+head+many.String()+"\r\n"), of("no host", "GET /v2/ HTTP/1.1\r\nConnection: close\r\n\r\n"),
		of("two hosts", "GET /v2/ HTTP/1.1\r\nHost: a\r\n"+head+"\r\n"), of("a host with a space", "GET /v2/ HTTP/1.1\r\nHost: a b\r\n\r\n"),
		of("a header without a name", "GET /v2/ HTTP/1.1\r\n"+head+": x\r\n\r\n"), of("a NUL in a header", "GET /v2/ HTTP/1.1\r\n"+head+"X-A: \x00\r\n\r\n"),
		of("a space before the colon", "GET /v2/ HTTP/1.1\r\n"+head+"X-A : x\r\n\r\n"), of("a NUL in the path", "GET /v2/\x00 HTTP/1.1\r\n"+head+"\r\n"),
		of("no path", "GET  HTTP/1.1\r\n"+head+"\r\n"), of("a broken escape", "GET /v2/%zz HTTP/1.1\r\n"+head+"\r\n"),
		of("a method with a comma", "G,T /v2/ HTTP/1.1\r\n"+head+"\r\n"), of("a method of 64 KiB", fill(64<<10, "A")+" /v2/ HTTP/1.1\r\n"+head+"\r\n"),
		of("TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"+fill(600, "x")+"\r\n\r\n"),
		{name: "HTTP/2 with prior knowledge", send: []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + fill(100, "\x00")), half: true, may: 505},
		{name: "HTTP/3.7", send: []byte("GET /v2/ HTTP/3.7\r\n" + head + "\r\n"), may: 505},
	}
	for _, v := range []string{"-1", "99999999999999999999", "1, 2", "0x10", "+5", "", " "} {
		out = append(out, of(fmt.Sprintf("Content-Length %q", v), "PUT /v2/a/manifests/v1 HTTP/1.1\r\n"+head+"Content-Length: "+v+"\r\n\r\n"))
	}
	for _, v := range []string{"gzip", "chunked, chunked", "identity", "xchunked", "chunked;q=1"} {
		g := of("Transfer-Encoding "+v, "PUT /v2/a/manifests/v1 HTTP/1.1\r\n"+head+"Transfer-Encoding: "+v+"\r\n\r\n0\r\n\r\n")
		g.may = http.StatusNotImplemented
		out = append(out, g)
	}
	return append(out, of("two lengths", "PUT /v2/a/manifests/v1 HTTP/1.1\r\n"+head+"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx"))
}

// odd is requests for what nobody has: names, tags, digests and paths that no client of ours would send.
func odd(host string) (out []garbage) {
	for _, path := range []string{
		"/v2/../..", "/v2/../../etc/passwd", "/v2/%2e%2e/%2e%2e/etc/passwd", "/v2/..%2f..%2fetc%2fpasswd", "/v2/a/../b/manifests/v1", "/v2//", "/v2/a//manifests/v1",
		"/v2/%00/manifests/v1", "/v2/a/manifests/%00", "/v2/a/blobs/%00", "/v2/a/blobs/sha256:..%2f..%2fx", "/v2/a/manifests/..", "/v2/a/manifests/.",
		"/v2/a/manifests/%2e%2e", "/v2/a%2fb/manifests/v1", "/v2/A/manifests/v1", "/v2/a/manifests/" + fill(10_000, "t"), "/v2/" + fill(10_000, "n") + "/manifests/v1",
		"/v2/" + fill(5_000, "a/") + "a/manifests/v1", "/v2/a/blobs/sha256:" + fill(10_000, "0"), "/v2/a/blobs/md5:" + fill(32, "0"),
		"/v2/a/blobs/" + fill(10_000, "s") + ":0", "/v2/a/blobs/sha256:" + fill(64, "Z"), "/v2/a/blobs/uploads/" + fill(40_000, "A"), "/v2/a/blobs/uploads/..", "/v2/a/blobs/uploads/%2e%2e%2f",
		"/v2/a/tags/list?n=-1&last=" + fill(10_000, "%ff"), "/v2/a/tags/list?" + fill(5_000, "n=1&"), "/v2/a/referrers/sha256:x?artifactType=" + fill(1000, "%00"),
		"/v2/a/_kraken/metainfo/..", "/v2/a/_kraken/" + fill(1000, "x/"), "/announce/..%2f", "/blobs/%2e%2e/torrent", "/blobs/sha256:0/torrent",
		"//evil.example/..", "/\\..\\..", "/debug/pprof/../../x", "/metrics/%2e%2e/x", "/cache/pins/..%2f..%2fx",
	} {
		out = append(out, garbage{
			name: "GET " + path[:min(len(path), 60)], send: []byte("GET " + path + " HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\n\r\n"),
		})
	}
	return out
}

// bodies is well-formed heads with bodies that are not.
func bodies(t *testing.T, c *system, p *process) (out []garbage) {
	d := "sha256:" + fill(64, "1")
	routes := []string{"PUT /v2/a/manifests/v1", "POST /v2/a/blobs/uploads/?digest=" + d}
	switch p.Role {
	case "tracker":
		routes = []string{"POST /announce"}
	case "build-index":
		routes = append(routes[:1], "PUT /v2/a/_kraken/layers/"+d)
	case "origin", "proxy":
		hc := c.client(t)
		if p.Role == "origin" && c.plan.MutualTLS {
			hc = c.clientOf(t, thief(p))
		}
		a := do(t, hc, "POST", p.URL, "/v2/a/blobs/uploads/", nil).want(t, http.StatusAccepted, "a session")
		session := strings.TrimPrefix(a.header.Get("Location"), p.URL)
		routes = append(routes, "PATCH "+session, "PUT "+session+"?digest="+d)
		if p.Role == "origin" {
			routes = append(routes, "POST /v2/a/_kraken/lease/"+d, "POST /v2/a/_kraken/durable", "PUT /v2/a/_kraken/names/"+fill(64, "a"), "PUT /v2/a/_kraken/blobs/"+d)
		}
	}
	for _, route := range routes {
		fine := 0
		if strings.HasPrefix(route, "PATCH") {
			fine = http.StatusAccepted // a session takes any bytes
		}
		head := route + " HTTP/1.1\r\nHost: " + p.Addr + "\r\nConnection: close\r\nContent-Type: application/json\r\n"
		for name, chunks := range map[string]string{
			"no number": "ZZ\r\nabc\r\n0\r\n\r\n", "a negative chunk": "-5\r\nabcde\r\n0\r\n\r\n", "a huge chunk": "ffffffffffffffffff\r\nabc\r\n",
			"no end of a chunk": "3\r\nabcdef\r\n0\r\n\r\n", "a line of 1 MiB": fill(1<<20, "1"), "an extension of 1 MiB": "3;" + fill(1<<20, "x") + "\r\nabc\r\n0\r\n\r\n",
		} {
			out = append(out, garbage{name: route + ", chunks: " + name, send: []byte(head + "Transfer-Encoding: chunked\r\n\r\n" + chunks)})
		}
		out = append(out,
			garbage{name: route + ", cut off", send: []byte(head + "Content-Length: 1000\r\n\r\nabc"), half: true, closes: true},
			garbage{name: route + ", never sent", send: []byte(head + "Content-Length: 9223372036854775807\r\n\r\n"), half: true},
			garbage{name: route + ", NULs", send: []byte(head + "Content-Length: 1000\r\n\r\n" + fill(1000, "\x00")), may: fine},
			garbage{name: route + ", deep", send: []byte(head + "Content-Length: 100000\r\n\r\n" + fill(100_000, "[")), may: fine},
		)
	}
	return out
}

// noTLS is what a TLS listener, or one of BitTorrent, is asked by who speaks something else. To BitTorrent without TLS
// it may be the begin of an obfuscated handshake, which is answered by random bytes and waited for.
func noTLS(obfuscated bool) []garbage {
	hello := "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
	out := []garbage{
		{name: "random bytes", send: random(64 << 10)}, {name: "plain HTTP", send: []byte("GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n" + fill(100, "\r\n"))},
		{name: "half a TLS hello", send: []byte(hello), half: true}, {name: "a TLS hello of zeros", send: []byte(hello + fill(600, "\x00"))},
		{name: "a TLS record of 64 KiB", send: []byte("\x17\x03\x03\xff\xff" + fill(70_000, "x"))}, {name: "nothing", half: true},
	}
	for i := range out {
		out[i].half = out[i].half || obfuscated
	}
	return out
}

// metainfo is what an origin computed of a blob.
func (c *system) metainfo(t *testing.T, repository string, content []byte) *blob.Metainfo {
	t.Helper()
	hc := c.client(t)
	if c.plan.MutualTLS {
		hc = c.clientOf(t, "agent-01")
	}
	var m *blob.Metainfo
	d := pushBlob(t, c.client(t), c.Proxy.URL, repository, content)
	asked := 0
	// at each in turn: who does not own it has it fetched by an owner first
	eventually(t, 10*time.Second, func() error {
		asked++
		a, err := try(hc, "GET", c.Origins[asked%len(c.Origins)].URL, "/v2/"+repository+"/_kraken/metainfo/"+d.String(), nil)
		if err != nil {
			return err
		}
		if a.status != http.StatusOK {
			return fmt.Errorf("metainfo: status %d", a.status)
		}
		m, err = blob.ParseMetainfo(a.body)
		return err
	})
	return m
}

// peerGarbage is of a BitTorrent peer, for a blob that is there and for others.
func peerGarbage(m *blob.Metainfo) []garbage {
	hash := m.InfoHash()
	shake := func(hash []byte) []byte {
		b := append([]byte("\x13BitTorrent protocol\x00\x00\x00\x00\x00\x10\x00\x05"), hash...)
		return append(b, "-KN0001-abcdefghijkl"...)
	}
	after := func(name, message string) garbage {
		return garbage{name: name, send: append(shake(hash[:]), message...), half: true}
	}
	return []garbage{
		{name: "half a handshake", send: shake(hash[:])[:30], half: true}, {name: "a handshake for nothing", send: shake(make([]byte, 20)), half: true},
		{name: "another protocol", send: append([]byte{255}, random(400)...), half: true}, {name: "an encrypted handshake", send: random(700), half: true},
		after("a message of 4 GiB", "\xff\xff\xff\xff\x07"+fill(1000, "x")), after("an unknown message", "\x00\x00\x00\x05\xc8abcd"),
		after("have beyond the end", "\x00\x00\x00\x05\x04\xff\xff\xff\xff"), after("a long bitfield", "\x00\x00\xff\xff\x05"+fill(70_000, "\xff")),
		after("a request beyond the end", "\x00\x00\x00\x0d\x06\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), after("a piece that nobody asked for", "\x00\x00\x40\x09\x07"+fill(8+16384, "\x00")),
		after("an extended handshake of nothing", "\x00\x00\x00\x02\x14\x00"), after("an extended handshake, deep", "\x00\x01\x00\x02\x14\x00"+fill(65_536, "l")),
		after("10,000 requests", fill(10_000, "\x00\x00\x00\x0d\x06\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x40\x00")), after("hash messages", "\x00\x00\x00\x31\x15"+fill(48, "\xff")),
	}
}
