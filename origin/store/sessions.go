package store

import (
	"errors"
	"fmt"
	"math"
	"syscall"
)

// ErrTooMany is an upload that would go beyond the bounds of upload sessions. It may go on when others have ended.
var ErrTooMany = errors.New("too much is being uploaded at once")

// Sessions bounds the upload sessions of clients, which cost a client nothing. A bound of 0 in a store's configuration
// is none; Validate sets an origin's defaults. Transient sessions, which are of roles, don't count.
type Sessions struct {
	// Max is how many sessions there may be at once, default 8192, MaxPerSource how many of one source, default 512.
	Max          int `yaml:"sessions"`
	MaxPerSource int `yaml:"sessions_per_source"`
	// Share is the fraction of the capacity, or of the file system where that is smaller, which the bytes of all
	// sessions may take, default 0.8; SharePerSource those of one source, default 0.5. The rest is kept for blobs.
	Share          float64 `yaml:"share"`
	SharePerSource float64 `yaml:"share_per_source"`
	// Writers is how many sessions may be written at once, default a quarter of the process's descriptors: each takes
	// one, and its connection another. The rest is kept for commits, names and reads.
	Writers int `yaml:"writers"`
}

// Validate fills in an origin's defaults and refuses what can't work.
func (c *Sessions) Validate() error {
	def := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	def(&c.Max, 8192)
	def(&c.MaxPerSource, min(512, c.Max))
	def(&c.Writers, max(16, descriptors()/4))
	if c.Share == 0 {
		c.Share = 0.8
	}
	if c.SharePerSource == 0 {
		c.SharePerSource = min(0.5, c.Share)
	}
	if c.Max < 1 || c.MaxPerSource < 1 || c.MaxPerSource > c.Max || c.Writers < 1 {
		return fmt.Errorf("sessions %d, sessions_per_source %d, writers %d: want at least 1, and no more of one source than of all", c.Max, c.MaxPerSource, c.Writers)
	}
	if !(0 < c.SharePerSource && c.SharePerSource <= c.Share && c.Share <= 0.95) {
		return fmt.Errorf("share %g, share_per_source %g: want 0 < share_per_source <= share <= 0.95", c.Share, c.SharePerSource)
	}
	return nil
}

// descriptors is how many files and connections this process may have open.
func descriptors() int {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return 1024
	}
	return int(min(l.Cur, math.MaxInt32))
}

// held is what sessions take.
type held struct {
	sessions int
	bytes    int64
}

// sessionCounts are what all sessions take, and those of each source. The store's lock is held.
type sessionCounts struct {
	all     held
	sources map[string]held
	refused int64
}

func (c *sessionCounts) add(source string, sessions int, bytes int64) {
	c.all = held{c.all.sessions + sessions, c.all.bytes + bytes}
	s := c.sources[source]
	s = held{s.sessions + sessions, s.bytes + bytes}
	if s == (held{}) {
		delete(c.sources, source)
		return
	}
	c.sources[source] = s
}

// beginSession counts a session. Where there are as many as there may be, the session that was idle longest of the
// source that has most makes room for one of a source that has fewer; ErrTooMany where there is none such.
func (s *Store) beginSession(o UploadOptions) error {
	if o.Transient {
		return nil
	}
	for {
		victim, err := s.tryBegin(o)
		if victim == nil {
			return err
		}
		victim.makeRoom()
	}
}

// tryBegin counts a session, or returns one to end first, whose lock is held.
func (s *Store) tryBegin(o UploadOptions) (victim *Upload, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, limit := &s.sessions, s.cfg.Sessions
	if n := c.sources[o.Source].sessions; limit.MaxPerSource > 0 && n >= limit.MaxPerSource {
		c.refused++
		return nil, fmt.Errorf("%w: %s has %d sessions already", ErrTooMany, orUnknown(o.Source), n)
	}
	if limit.Max > 0 && c.all.sessions >= limit.Max {
		if victim := s.dispensable(o, func(h held) int64 { return int64(h.sessions) }); victim != nil {
			return victim, nil
		}
		c.refused++
		return nil, fmt.Errorf("%w: there are %d sessions already", ErrTooMany, c.all.sessions)
	}
	c.add(o.Source, 1, 0)
	return nil, nil
}

// dispensable returns the session that was idle longest of the source that takes most, where that is more than what o's
// source takes, with its lock held. Nil where there is none, or all of that source's are being written. The caller
// holds s.mu.
func (s *Store) dispensable(o UploadOptions, takes func(held) int64) *Upload {
	most, greediest := takes(s.sessions.sources[o.Source]), o.Source
	for source, h := range s.sessions.sources {
		if n := takes(h); n > most {
			most, greediest = n, source
		}
	}
	if greediest == o.Source {
		return nil
	}
	var victim *Upload
	for _, u := range s.uploads {
		if u.o.Transient || u.o.Source != greediest || victim != nil && u.touched.Load() >= victim.touched.Load() || !u.mu.TryLock() {
			continue
		}
		if u.ended {
			u.mu.Unlock()
			continue
		}
		if victim != nil {
			victim.mu.Unlock()
		}
		victim = u
	}
	return victim
}

// makeRoom ends a session whose lock is held, for one of another source.
func (u *Upload) makeRoom() {
	defer u.mu.Unlock()
	if err := u.end(); err != nil {
		u.s.log.Warn("an upload session that made room for another's stays on the disk until the next start", "upload", u.id, "error", err)
	}
	u.s.evictedSessions.Add(1)
}

func orUnknown(source string) string {
	if source == "" {
		return "the client"
	}
	return source
}

// endSession takes a session with its bytes off the account of sessions.
func (s *Store) endSession(o UploadOptions, bytes int64) {
	if o.Transient {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sessions.add(o.Source, -1, -bytes)
}

// errKeptFree is that sessions leave the file system's reserve (disk.Space) free, for names and commits.
var errKeptFree = errors.New("what is left is kept for names and commits")

// chargeSession accounts for n more bytes of a session of have bytes: ErrTooMany when others leave no room for them
// now, ErrFull when there never will be. Sessions of a source that takes more make room.
func (s *Store) chargeSession(o UploadOptions, have, n int64) error {
	if o.Transient {
		return nil
	}
	for {
		victim, err := s.tryCharge(o, have, n)
		if victim == nil {
			return err
		}
		victim.makeRoom()
	}
}

// tryCharge accounts for n more bytes, or returns a session to end first, whose lock is held.
func (s *Store) tryCharge(o UploadOptions, have, n int64) (victim *Upload, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, limit := &s.sessions, s.cfg.Sessions
	base := s.disk
	if s.cfg.Capacity > 0 {
		base = min(base, s.cfg.Capacity)
	}
	check := func(share float64, used int64, who string) error {
		most := int64(float64(base) * share)
		if share == 0 || used+n <= most {
			return nil
		}
		if have+n > most {
			return fmt.Errorf("%w: a blob of more than %d bytes can't be uploaded here", ErrFull, most)
		}
		return fmt.Errorf("%w: the unfinished uploads of %s have %d bytes, at most %d may be", ErrTooMany, who, used, most)
	}
	if err := check(limit.SharePerSource, c.sources[o.Source].bytes, orUnknown(o.Source)); err != nil {
		c.refused++
		return nil, err
	}
	if err := check(limit.Share, c.all.bytes, "all"); err != nil {
		if errors.Is(err, ErrTooMany) {
			if victim := s.dispensable(o, func(h held) int64 { return h.bytes }); victim != nil {
				return victim, nil
			}
		}
		c.refused++
		return nil, err
	}
	if limit.Share > 0 {
		if space, err := s.Space(); err == nil && space.Free-n < space.Reserve() {
			c.refused++
			return nil, s.full(errKeptFree)
		}
	}
	c.add(o.Source, 0, n)
	return nil, nil
}

// unchargeSession takes back chargeSession.
func (s *Store) unchargeSession(o UploadOptions, n int64) {
	if o.Transient {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sessions.add(o.Source, 0, -n)
}

// beginWrite counts a session that is being written, whose file is open until end is called.
func (s *Store) beginWrite(o UploadOptions) (end func(), err error) {
	if o.Transient {
		return func() {}, nil
	}
	if n := s.writers.Add(1); s.cfg.Sessions.Writers > 0 && n > int64(s.cfg.Sessions.Writers) {
		s.writers.Add(-1)
		return nil, fmt.Errorf("%w: %d uploads are being written", ErrTooMany, n-1)
	}
	return func() { s.writers.Add(-1) }, nil
}

// park closes the file of a client's session between two requests: a session costs no descriptor. The state of its hash
// stays, so that a commit reads nothing again. The caller holds u.mu.
func (u *Upload) park() {
	if u.o.Transient || u.f == nil {
		return
	}
	if err := u.f.Close(); err != nil {
		u.s.log.Warn("closing the file of an upload session", "upload", u.id, "error", err)
	}
	u.f = nil
}

// held is what all sessions of clients take.
func (s *Store) held() held {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sessions.all
}
