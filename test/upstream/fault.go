package upstream

import (
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Rule is something that goes wrong with requests that it matches. What is empty matches all; the first rule that
// matches counts.
type Rule struct {
	// Kind and About choose requests, as in Registry.Count.
	Kind, About string
	// User chooses requests with a Basic authorization of this user.
	User string
	// Times is how many requests it is for; 0 is all.
	Times int
	// After lets so many pass first.
	After int

	// Status answers with an error, RetryAfter in seconds beside it. Body is its body, default one of the API.
	Status     int
	RetryAfter int
	// Hang sends nothing until the client goes away. Delay waits before the answer.
	Hang  bool
	Delay time.Duration
	// Refuse closes the connection without an answer.
	Refuse bool
	// Cut ends the body after CutAt bytes, by FIN, or by RST where Reset is set. HangBody stands still there instead,
	// where the body is longer.
	Cut, Reset, HangBody bool
	CutAt                int64
	// Flip changes the body's byte FlipAt.
	Flip   bool
	FlipAt int64
	// Short ends the body clean, with a Content-Length that is true for it, so many bytes too early; Long adds bytes.
	Short, Long int64
	// NoDigest, NoLength leave out the header.
	NoDigest, NoLength bool
	// Digest answers about another digest.
	Digest string
	// Location redirects there.
	Location string
	// Header is added.
	Header http.Header

	seen int
	off  bool
}

// Fail adds a rule, before those that are there. The returned function takes it back.
func (r *Registry) Fail(rule Rule) (undo func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	own := &rule
	r.rules = append([]*Rule{own}, r.rules...)
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		own.off = true
	}
}

// Heal takes all rules back.
func (r *Registry) Heal() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rules = nil
}

// ruleFor returns what goes wrong with a request, a zero Rule for nothing.
func (r *Registry) ruleFor(q Request) Rule {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, u := range r.rules {
		if u.off || u.Kind != "" && u.Kind != q.Kind || !strings.Contains(q.Repository+" "+q.Reference, u.About) || u.User != "" && u.User != q.User {
			continue
		}
		u.seen++
		if u.seen <= u.After || u.Times > 0 && u.seen > u.After+u.Times {
			continue
		}
		return *u
	}
	return Rule{}
}

// before does what a rule says happens in place of an answer, and reports whether it did.
func (r *Registry) before(w http.ResponseWriter, req *http.Request, u Rule) (done bool) {
	if u.Delay > 0 {
		t := time.NewTimer(u.Delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-req.Context().Done():
		case <-r.hung:
		}
	}
	for k, v := range u.Header {
		w.Header()[k] = v
	}
	switch {
	case u.Hang:
		r.hang(req)
		panic(http.ErrAbortHandler)
	case u.Refuse:
		panic(http.ErrAbortHandler)
	case u.Location != "":
		w.Header().Set("Location", u.Location)
		w.WriteHeader(http.StatusTemporaryRedirect)
		return true
	case u.Status != 0:
		if u.RetryAfter > 0 {
			w.Header().Set("Retry-After", strconv.Itoa(u.RetryAfter))
		}
		writeError(w, u.Status, "UNKNOWN", "by the script")
		return true
	}
	return false
}

// hang waits until the client goes away, or the test ends.
func (r *Registry) hang(req *http.Request) {
	select {
	case <-req.Context().Done():
	case <-r.hung:
	}
}

// body sends a whole body or a part of it as a rule says.
func (r *Registry) body(w http.ResponseWriter, req *http.Request, status int, b []byte, u Rule) {
	if u.Flip && u.FlipAt < int64(len(b)) {
		b = append([]byte(nil), b...)
		b[u.FlipAt] ^= 1
	}
	if u.Short > 0 {
		b = b[:max(0, int64(len(b))-u.Short)]
	}
	if u.Long > 0 {
		b = append(append([]byte(nil), b...), make([]byte, u.Long)...)
	}
	if !u.NoLength {
		w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	}
	w.WriteHeader(status)
	if req.Method == http.MethodHead {
		return
	}
	if !u.Cut && (!u.HangBody || u.CutAt >= int64(len(b))) {
		r.paced(w, req, b)
		return
	}
	r.paced(w, req, b[:min(u.CutAt, int64(len(b)))])
	if u.HangBody {
		r.hang(req)
	}
	if u.Reset {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			if tcp := tcpOf(conn); tcp != nil {
				tcp.SetLinger(0)
				tcp.Close()
			}
			conn.Close()
		}
		return
	}
	panic(http.ErrAbortHandler)
}

// paced writes b, at Options.Rate.
func (r *Registry) paced(w http.ResponseWriter, req *http.Request, b []byte) {
	rc := http.NewResponseController(w)
	step := len(b)
	if r.o.Rate > 0 {
		step = max(r.o.Rate/50, 1)
	}
	for len(b) > 0 {
		n := min(step, len(b))
		if _, err := w.Write(b[:n]); err != nil {
			return
		}
		b = b[n:]
		if rc.Flush() != nil {
			return
		}
		if r.o.Rate > 0 {
			t := time.NewTimer(time.Duration(n) * time.Second / time.Duration(r.o.Rate))
			select {
			case <-t.C:
			case <-req.Context().Done():
				t.Stop()
				return
			}
		}
	}
	rc.Flush()
}
