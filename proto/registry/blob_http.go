package registry

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

const octets = "application/octet-stream"

func (s Server) blob(w http.ResponseWriter, r *http.Request, repo, arg string) error {
	d, err := parseDigest(arg)
	if err != nil {
		return err
	}
	if s.Private {
		w.Header().Set("Cache-Control", "private, max-age=31536000, immutable")
	}
	switch {
	case r.Method == http.MethodHead && s.Blobs != nil:
		desc, err := s.Blobs.StatBlob(r.Context(), repo, d)
		if err != nil {
			return err
		}
		blobHeaders(w.Header(), d)
		if has(r, d) {
			w.WriteHeader(http.StatusNotModified)
			return nil
		}
		w.Header().Set("Accept-Ranges", "bytes")
		w.Header().Set("Content-Length", strconv.FormatInt(desc.Size, 10))
		w.WriteHeader(http.StatusOK)
		return nil
	case r.Method == http.MethodGet && s.Blobs != nil:
		if has(r, d) {
			// Only what exists is not modified.
			if _, err := s.Blobs.StatBlob(r.Context(), repo, d); err != nil {
				return err
			}
			blobHeaders(w.Header(), d)
			w.WriteHeader(http.StatusNotModified)
			return nil
		}
		c, err := s.Blobs.OpenBlob(r.Context(), repo, d, rangeHint(r.Header.Get("Range")))
		if err != nil {
			return err
		}
		return ServeContent(w, r, c)
	case r.Method == http.MethodDelete && s.BlobDeleter != nil:
		if err := s.BlobDeleter.DeleteBlob(r.Context(), repo, d); err != nil {
			return err
		}
		w.WriteHeader(http.StatusAccepted)
		return nil
	}
	return s.unsupported(r)
}

// has reports whether If-None-Match names d or is "*": the client holds the blob already.
func has(r *http.Request, d digest.Digest) bool {
	ds, any := etags(r.Header.Values("If-None-Match"))
	return any || slices.Contains(ds, d)
}

func etag(d digest.Digest) string { return `"` + d.String() + `"` }

func blobHeaders(h http.Header, d digest.Digest) {
	h.Set("Docker-Content-Digest", d.String())
	h.Set("ETag", etag(d))
	h.Set("Content-Type", octets)
	if h.Get("Cache-Control") == "" {
		h.Set("Cache-Control", "public, max-age=31536000, immutable")
	}
}

// ServeContent sends an open blob, by sendfile where it is a file, and closes it. A range that the blob does not have
// is ErrRangeNotSatisfiable, with nothing sent; more than MaxRanges, or more than two that overlap, are answered with
// the whole. A body that fails midway resets the connection: a clean end would make a cut or wrong blob look whole.
func ServeContent(w http.ResponseWriter, r *http.Request, c *Content) error {
	defer c.Close()
	blobHeaders(w.Header(), c.Digest)
	r, ok := withoutEmptyRanges(r, c)
	if !ok {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", c.Size))
		return fmt.Errorf("%w: Range %.100q asks for the last 0 bytes of %s", ErrRangeNotSatisfiable, r.Header.Get("Range"), c.Digest)
	}
	r, ranges := chooseRanges(r, c.Size)
	if c.Plan != nil && len(ranges) > 0 {
		c.Plan(ranges)
	}
	rw := &rangeWriter{ResponseWriter: w}
	if c.File != nil {
		http.ServeContent(rw, r, "", time.Time{}, c.File)
	} else {
		body := &watched{ReadSeeker: c.Body}
		http.ServeContent(rw, r, "", time.Time{}, body)
		if body.err != nil {
			panic(http.ErrAbortHandler)
		}
	}
	if rw.refused {
		return fmt.Errorf("%w: Range %.100q of %s, which has %d bytes", ErrRangeNotSatisfiable, r.Header.Get("Range"), c.Digest, c.Size)
	}
	return nil
}

// withoutEmptyRanges returns r without the ranges of the last 0 bytes, "-0", which can't be satisfied (RFC 9110,
// 14.1.2) and which http.ServeContent answers with a part that ends before it begins. It returns false, and r as it is,
// when no other is left.
func withoutEmptyRanges(r *http.Request, c *Content) (*http.Request, bool) {
	spec, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes=")
	if condition := r.Header.Get("If-Range"); !ok || (condition != "" && condition != etag(c.Digest)) {
		return r, true // not looked at
	}
	all := strings.Split(spec, ",")
	kept := slices.DeleteFunc(slices.Clone(all), func(one string) bool {
		n, suffix := strings.CutPrefix(strings.TrimSpace(one), "-")
		n = strings.TrimSpace(n)
		return suffix && n != "" && strings.Trim(n, "0") == ""
	})
	switch len(kept) {
	case len(all):
		return r, true
	case 0:
		return r, false
	}
	r = r.Clone(r.Context())
	r.Header.Set("Range", "bytes="+strings.Join(kept, ","))
	return r, true
}

// rangeWriter holds back the 416 of http.ServeContent, which is plain text; its header Content-Range stays.
type rangeWriter struct {
	http.ResponseWriter
	refused bool
}

func (w *rangeWriter) WriteHeader(status int) {
	if w.refused = status == http.StatusRequestedRangeNotSatisfiable; !w.refused {
		w.ResponseWriter.WriteHeader(status)
	}
}

func (w *rangeWriter) Write(b []byte) (int, error) {
	if w.refused {
		return len(b), nil
	}
	return w.ResponseWriter.Write(b)
}

// ReadFrom keeps sendfile: http.ServeContent copies after it has sent the header.
func (w *rangeWriter) ReadFrom(r io.Reader) (int64, error) { return io.Copy(w.ResponseWriter, r) }

// watched remembers that a read failed: http.ServeContent doesn't tell.
type watched struct {
	io.ReadSeeker
	err error
}

func (w *watched) Read(b []byte) (int, error) {
	n, err := w.ReadSeeker.Read(b)
	if err != nil && err != io.EOF {
		w.err = err
	}
	return n, err
}

// startUpload is POST: a mount, a whole blob (?digest=), or a session.
func (s Server) startUpload(w http.ResponseWriter, r *http.Request, repo string) error {
	ctx, q := r.Context(), r.URL.Query()
	// what can't be a blob can't be mounted, and is uploaded
	if d, merr := parseDigest(q.Get("mount")); merr == nil && s.Mounter != nil {
		from := q.Get("from")
		if CheckName(from) != nil {
			from = "" // a hint that is none
		}
		_, err := s.Mounter.MountBlob(ctx, repo, from, d)
		if err == nil {
			return created(w, repo, d)
		}
		if !errors.Is(err, ErrBlobUnknown) {
			return err
		}
	}
	o := UploadOptions{Size: -1, Source: s.sourceOf(r)}
	var err error
	if h := s.Dialect.get(r.Header, s.Dialect.Digest); h != "" {
		if o.Digest, err = parseDigest(h); err != nil {
			return err
		}
	}
	if h := s.Dialect.get(r.Header, s.Dialect.Size); h != "" {
		if o.Size, err = strconv.ParseInt(h, 10, 64); err != nil || o.Size < 0 {
			return fmt.Errorf("%w: %s %.30q", ErrSizeInvalid, s.Dialect.Size, h)
		}
	}
	whole := q.Get("digest")
	if whole == "" {
		u, err := s.Uploads.StartUpload(ctx, repo, o)
		if err != nil {
			return err
		}
		s.Dialect.uploadHeaders(w.Header(), uploadsOf(repo), u)
		if s.ChunkMinLength > 0 {
			w.Header().Set("OCI-Chunk-Min-Length", strconv.FormatInt(s.ChunkMinLength, 10))
		}
		w.WriteHeader(http.StatusAccepted)
		return nil
	}
	if o.Digest, err = parseDigest(whole); err != nil {
		return err
	}
	o.Size = r.ContentLength
	u, err := s.Uploads.StartUpload(ctx, repo, o)
	if err != nil {
		return err
	}
	if _, err := s.Uploads.CommitUpload(ctx, repo, u.ID, o.Digest, Chunk{0, r.ContentLength, r.Body}); err != nil {
		// Nobody was told the session's name: it must not stay.
		if aerr := s.Uploads.AbortUpload(detached(ctx), repo, u.ID); aerr != nil && !errors.Is(aerr, ErrBlobUploadUnknown) {
			s.Log.Warn("a failed upload stays until it expires", "repository", repo, "upload", u.ID, "error", aerr)
		}
		return err
	}
	return created(w, repo, o.Digest)
}

func created(w http.ResponseWriter, repo string, d digest.Digest) error {
	w.Header().Set("Location", "/v2/"+repo+"/blobs/"+d.String())
	w.Header().Set("Docker-Content-Digest", d.String())
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(http.StatusCreated)
	return nil
}

func uploadsOf(repo string) string { return "/v2/" + repo + "/blobs/uploads/" }

// sessionsOf returns the path of a request to a session, up to the session's id.
func sessionsOf(p string) string {
	dir, _, _ := cutLast(p)
	return dir + "/"
}

// uploadHeaders sets a session's Location and how far it is. An empty session has Range 0-0, as clients expect.
func (d Dialect) uploadHeaders(h http.Header, base string, u Upload) {
	h.Set("Location", base+u.ID)
	h.Set("Docker-Upload-UUID", u.ID)
	h.Set("Range", fmt.Sprintf("0-%d", max(0, u.Offset-1)))
	if d.Offset != "" {
		h.Set(d.Offset, strconv.FormatInt(u.Offset, 10))
	}
	h.Set("Content-Length", "0")
}

// upload is PATCH, GET, PUT and DELETE of a session.
func (s Server) upload(w http.ResponseWriter, r *http.Request, repo, arg string) error {
	id, query := uploadQuery(r, arg)
	if !sessionID(id) {
		return fmt.Errorf("%w: %.80q", ErrBlobUploadUnknown, id)
	}
	ctx, base := r.Context(), uploadsOf(repo)
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		u, err := s.Uploads.UploadStatus(ctx, repo, id)
		if err != nil {
			return err
		}
		s.Dialect.uploadHeaders(w.Header(), base, u)
		w.WriteHeader(http.StatusNoContent)
		return nil
	case http.MethodPatch:
		c, err := s.Dialect.chunkOf(r)
		if err != nil {
			return err
		}
		u, err := s.Uploads.WriteUpload(ctx, repo, id, c)
		if err != nil {
			return err
		}
		s.Dialect.uploadHeaders(w.Header(), base, u)
		w.WriteHeader(http.StatusAccepted)
		return nil
	case http.MethodPut:
		d, err := parseDigest(query.Get("digest"))
		if err != nil {
			return err
		}
		c, err := s.Dialect.chunkOf(r)
		if err != nil {
			return err
		}
		if r.ContentLength == 0 {
			c.Body = nil
		}
		desc, err := s.Uploads.CommitUpload(ctx, repo, id, d, c)
		if err != nil {
			return err
		}
		if name := s.Dialect.Size; name != "" {
			w.Header().Set(name, strconv.FormatInt(desc.Size, 10))
		}
		return created(w, repo, d)
	case http.MethodDelete:
		if err := s.Uploads.AbortUpload(ctx, repo, id); err != nil {
			return err
		}
		w.WriteHeader(http.StatusNoContent)
		return nil
	}
	return s.unsupported(r)
}

// uploadQuery returns the id of a session and the query of a request to it. Clients that have only seen Locations with
// a query add theirs with "&", so that it arrives in the path; an id has no "&".
func uploadQuery(r *http.Request, arg string) (id string, query url.Values) {
	id, added, _ := strings.Cut(arg, "&")
	query = r.URL.Query()
	if more, err := url.ParseQuery(added); err == nil {
		for k, vs := range more {
			query[k] = append(query[k], vs...)
		}
	}
	return id, query
}

func sessionID(s string) bool {
	for _, c := range []byte(s) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_') {
			return false
		}
	}
	return s != "" && len(s) <= 1024
}

// chunkOf reads Content-Range, in the specification's form "0-99" and in HTTP's "bytes 0-99/*". Of an empty body it is
// not looked at: no range has no bytes, and clients make up various ones.
func (d Dialect) chunkOf(r *http.Request) (Chunk, error) {
	c := Chunk{-1, r.ContentLength, r.Body}
	h := r.Header.Get("Content-Range")
	if h == "" || r.ContentLength == 0 {
		if at := d.get(r.Header, d.Offset); at != "" {
			n, err := strconv.ParseInt(at, 10, 64)
			if err != nil || n < 0 {
				return c, fmt.Errorf("%w: %s %.30q", ErrBlobUploadInvalid, d.Offset, at)
			}
			c.Offset = n
		}
		return c, nil
	}
	first, last, err := parseContentRange(h)
	if err != nil {
		return c, err
	}
	if r.ContentLength >= 0 && last-first+1 != r.ContentLength {
		return c, fmt.Errorf("%w: Content-Range %.60q, Content-Length %d", ErrSizeInvalid, h, r.ContentLength)
	}
	c.Offset, c.Length = first, last-first+1
	return c, nil
}

func parseContentRange(h string) (first, last int64, err error) {
	spec, _, _ := strings.Cut(strings.TrimSpace(strings.TrimPrefix(h, "bytes")), "/")
	a, b, ok := strings.Cut(strings.TrimPrefix(strings.TrimSpace(spec), "="), "-")
	first, err1 := strconv.ParseInt(a, 10, 64)
	last, err2 := strconv.ParseInt(b, 10, 64)
	if !ok || err1 != nil || err2 != nil || first < 0 || last < first || last == math.MaxInt64 {
		return 0, 0, fmt.Errorf("%w: Content-Range %.60q: want <first>-<last>", ErrBlobUploadInvalid, h)
	}
	return first, last, nil
}
