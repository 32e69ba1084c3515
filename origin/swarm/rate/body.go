package rate

import (
	"context"
	"errors"
	"io"

	"github.com/opencontainers/go-digest"
)

// Upload returns body kept to the upload limits, to be sent over HTTP. While there are none it returns the body itself,
// so that a file still goes by sendfile: a limit that is set later concerns the next request. Reads end with ctx.
func (l *Limiter) Upload(ctx context.Context, d digest.Digest, body io.ReadSeeker) io.ReadSeeker {
	if r := l.Limits(); r.UploadRate == 0 && r.BlobUploadRate == 0 {
		return body
	}
	return &limited{l: l, ctx: ctx, digest: d, upload: true, r: body, Seeker: body}
}

// Download returns r, which reads a blob that comes over HTTP, kept to the download limits. Reads end with ctx.
func (l *Limiter) Download(ctx context.Context, d digest.Digest, r io.Reader) io.Reader {
	return &limited{l: l, ctx: ctx, digest: d, r: r}
}

type limited struct {
	io.Seeker
	l      *Limiter
	ctx    context.Context
	digest digest.Digest
	upload bool
	r      io.Reader
}

func (l *limited) Read(b []byte) (int, error) {
	r := l.l.Limits()
	turn, wait := turnOf(lower(r.DownloadRate, r.BlobDownloadRate)), l.l.WaitDown
	if l.upload {
		turn, wait = turnOf(lower(r.UploadRate, r.BlobUploadRate)), l.l.WaitUp
	}
	n, err := l.r.Read(b[:min(len(b), turn)])
	if n > 0 && !wait(l.ctx.Done(), l.digest, n) {
		return n, errors.Join(err, context.Cause(l.ctx))
	}
	return n, err
}
