package airgap

import (
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// sayEvery is the time between two lines about one image.
const sayEvery = 2 * time.Second

// progress tells on out what is carried: a line every few seconds, and one at the end of each image.
type progress struct {
	out   io.Writer
	total int // images

	mu               sync.Mutex
	n                int // of the image under way
	image            string
	began, said      time.Time
	sent, there, sum int64 // bytes of this image that were pushed, and that the cluster had; pushed of all
}

func (p *progress) begin(image string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.n, p.image, p.began, p.said, p.sent, p.there = p.n+1, image, time.Now(), time.Now(), 0, 0
}

// had notes bytes that need not be pushed.
func (p *progress) had(n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.there += n
}

// add notes bytes that are on their way.
func (p *progress) add(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sent, p.sum = p.sent+int64(n), p.sum+int64(n)
	if time.Since(p.said) >= sayEvery {
		p.said = time.Now()
		rate := float64(p.sent) / time.Since(p.began).Seconds()
		fmt.Fprintf(p.out, "[%d/%d] %s: %.1f MiB, %.1f MiB/s\n", p.n, p.total, p.image, mib(p.sent), rate/(1<<20))
	}
}

// end tells that an image is there.
func (p *progress) end(d digest.Digest) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Fprintf(p.out, "[%d/%d] %s@%s: %.1f MiB pushed, %.1f MiB were there, %s\n", p.n, p.total, p.image, d, mib(p.sent), mib(p.there), time.Since(p.began).Round(time.Millisecond))
}

func mib(n int64) float64 { return float64(n) / (1 << 20) }

// count returns r, whose bytes are counted.
func (p *progress) count(r io.Reader) io.Reader { return counted{r, p} }

type counted struct {
	r io.Reader
	p *progress
}

// Read implements io.Reader.
func (c counted) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.p.add(n)
	return n, err
}
