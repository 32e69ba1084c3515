package origin

import (
	"fmt"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/registry"
)

// committedSessions bounds the sessions that are remembered after their commit.
const committedSessions = 16384

// committed is what became of an upload session.
type committed struct {
	repo   string
	digest digest.Digest
	size   int64
	at     time.Time
}

// commits remembers sessions for a while after their commit, so that a commit whose answer was lost, or whose blob
// could not be made a member of its repository at once, may be asked for again. Only the very session that brought the
// bytes is answered for: who knows no more than a digest gains nothing. It is memory, and ends with the process.
type commits struct {
	keep time.Duration
	byID *lru.Cache[string, committed]
}

func newCommits(keep time.Duration) (*commits, error) {
	byID, err := lru.New[string, committed](committedSessions)
	return &commits{keep, byID}, err
}

func (c *commits) add(id, repo string, desc v1.Descriptor) {
	c.byID.Add(id, committed{repo, desc.Digest, desc.Size, time.Now()})
}

// again is the answer to the repeated commit of session id; ErrBlobUploadUnknown when it was not committed to repo as
// d, here and lately.
func (c *commits) again(repo, id string, d digest.Digest) (v1.Descriptor, error) {
	if done, ok := c.byID.Peek(id); ok && done.repo == repo && done.digest == d && time.Since(done.at) < c.keep {
		return v1.Descriptor{MediaType: "application/octet-stream", Digest: d, Size: done.size}, nil
	}
	return v1.Descriptor{}, fmt.Errorf("%w: %.64q of %s", registry.ErrBlobUploadUnknown, id, repo)
}
