package registry

import (
	"math"
	"net/http"
	"strconv"
	"strings"
)

// MaxRanges is how many ranges of one request are served as such. More, or more than two that overlap, are answered
// with the whole blob and 200, as RFC 9110 section 14.2 allows: each range costs a seek here and perhaps a request
// elsewhere, and its answer's headers are longer than it may be.
const MaxRanges = 32

// readThrough is the gap in bytes between two ranges up to which both are read by one request of another registry, and
// the gap is thrown away: a request costs more than so many bytes.
const readThrough = 64 << 10

// knownUnit removes a Range of another unit than bytes, which a server must ignore, and writes that of bytes in lower
// case: units have none (RFC 9110, 14.1 and 14.2).
func knownUnit(h http.Header) {
	if v := h.Get("Range"); v != "" {
		if unit, spec, ok := strings.Cut(v, "="); ok && strings.EqualFold(strings.TrimSpace(unit), "bytes") {
			h.Set("Range", "bytes="+spec)
		} else {
			h.Del("Range")
		}
	}
}

// byteRange is first-last of a Range header. A negative first means the last so many bytes, a negative last means to
// the end.
type byteRange struct{ first, last int64 }

// parseRanges reads a Range header; ok is false for what is none, which http.ServeContent answers.
func parseRanges(header string) (rs []byteRange, ok bool) {
	spec, ok := strings.CutPrefix(header, "bytes=")
	if !ok {
		return nil, false
	}
	for s := range strings.SplitSeq(spec, ",") {
		s = strings.TrimSpace(s)
		if s == "" {
			continue
		}
		a, b, dash := strings.Cut(s, "-")
		a, b = strings.TrimSpace(a), strings.TrimSpace(b)
		r := byteRange{first: -1, last: -1}
		var err error
		if a != "" {
			r.first, err = strconv.ParseInt(a, 10, 64)
		}
		if err == nil && b != "" {
			r.last, err = strconv.ParseInt(b, 10, 64)
		}
		if a == "" {
			r.first, r.last = -r.last, -1 // a suffix
		}
		// One more than the largest number has no length.
		if !dash || err != nil || a == "" && r.first >= 0 || a != "" && r.first < 0 || r.last == math.MaxInt64 || a != "" && b != "" && r.last < r.first {
			return nil, false
		}
		if rs = append(rs, r); len(rs) > MaxRanges {
			break
		}
	}
	return rs, len(rs) > 0
}

// resolve returns what ranges mean for a blob of size bytes, without those that it does not have.
func resolve(rs []byteRange, size int64) []Range {
	out := make([]Range, 0, len(rs))
	for _, r := range rs {
		if r.first < 0 {
			r.first, r.last = max(0, size+r.first), size-1
		}
		if r.last < 0 || r.last >= size {
			r.last = size - 1
		}
		if r.first <= r.last {
			out = append(out, Range{r.first, r.last - r.first + 1})
		}
	}
	return out
}

// overlaps returns how many pairs of ranges overlap. One pair is served, more are not (RFC 9110 section 14.2: "more
// than two overlapping ranges").
func overlaps(rs []Range) (pairs int) {
	for i, a := range rs {
		for _, b := range rs[:i] {
			if a.Offset < b.Offset+b.Length && b.Offset < a.Offset+a.Length {
				pairs++
			}
		}
	}
	return pairs
}

// chooseRanges returns the ranges of a blob that a request is answered with, and the request for http.ServeContent:
// without Range where the answer is the whole.
func chooseRanges(r *http.Request, size int64) (*http.Request, []Range) {
	rs, ok := parseRanges(r.Header.Get("Range"))
	if !ok {
		return r, nil
	}
	if len(rs) <= MaxRanges {
		if out := resolve(rs, size); overlaps(out) <= 1 {
			return r, out
		}
	}
	r = r.Clone(r.Context())
	r.Header.Del("Range")
	return r, nil
}

// run returns the range of bytes to ask another registry for, so that pos can be read: to the end of the planned range
// that has pos, and of those after it that follow in order within small gaps. Without a plan it is to the end of the
// blob.
func run(plan []Range, pos int64) Range {
	at, end := -1, int64(0)
	for i, r := range plan {
		if last := r.Offset + r.Length; pos >= r.Offset && pos < last && last > end {
			at, end = i, last // of two that overlap the one that goes further
		}
	}
	if at < 0 {
		return Range{pos, -1}
	}
	for _, next := range plan[at+1:] {
		if next.Offset < end || next.Offset-end > readThrough {
			break
		}
		end = next.Offset + next.Length
	}
	return Range{pos, end - pos}
}

// rangeHint returns the range that a request will read first, to open the blob there: of several ranges the first, with
// those that are read with it. Whole when the header does not tell.
func rangeHint(header string) Range {
	rs, ok := parseRanges(header)
	if !ok || len(rs) > MaxRanges || rs[0].first < 0 {
		return Whole
	}
	if rs[0].last < 0 {
		return Range{rs[0].first, -1}
	}
	var plan []Range
	for _, r := range rs {
		if r.first < 0 || r.last < 0 {
			break // its length depends on the blob's
		}
		plan = append(plan, Range{r.first, r.last - r.first + 1})
	}
	if overlaps(plan) > 1 {
		return Whole
	}
	return run(plan, rs[0].first)
}
