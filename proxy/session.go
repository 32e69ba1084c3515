package proxy

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// session is what the proxy's upload id says: which origins hold the bytes, under which ids. The proxy itself keeps
// nothing, so that any proxy with the same key can go on with any upload (proto/README.md section 4).
type session struct {
	V    int    `json:"v"`
	S    []part `json:"s"`
	Repo string `json:"r"`
}

type part struct {
	Origin string `json:"o"` // configured id, never an address
	Upload string `json:"u"` // a UUID
}

const (
	sessionVersion = 2
	maxSessionID   = 1024 // bytes of an upload id, as many as proto/registry takes
)

// errSession is an id that no proxy with this key has made.
var errSession = errors.New("no upload id of this cluster")

// signer makes upload ids and knows its own again. keys returns the keys of now, at least one: the first signs, and
// what any of them has signed is known.
type signer struct{ keys func() [][]byte }

func mac(key, b []byte) []byte {
	m := hmac.New(sha256.New, key)
	m.Write(b) // a hash never fails
	return m.Sum(nil)
}

// seal returns the id of a session: base64url of the HMAC-SHA256 of its JSON, then the JSON.
func (s signer) seal(v session) string {
	b, err := json.Marshal(v)
	if err != nil { // strings and ints always marshal
		return ""
	}
	return base64.RawURLEncoding.EncodeToString(append(mac(s.keys()[0], b), b...))
}

// unseal returns the session of an id that seal has made with one of the keys, and errSession for everything else.
// Nothing of an id is read before its signature was found good.
func (s signer) unseal(id string) (session, error) {
	sum, b, err := splitID(id)
	if err != nil {
		return session{}, err
	}
	if !slices.ContainsFunc(s.keys(), func(key []byte) bool { return hmac.Equal(sum, mac(key, b)) }) {
		return session{}, fmt.Errorf("%w: it was changed, or made with another key: begin a new upload", errSession)
	}
	return parseSession(b)
}

// splitID returns the two parts of an id, the signature and what is signed.
func splitID(id string) (mac, b []byte, err error) {
	if len(id) > maxSessionID {
		return nil, nil, fmt.Errorf("%w: it has %d bytes, at most %d", errSession, len(id), maxSessionID)
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(id)
	if err != nil || len(raw) <= sha256.Size {
		return nil, nil, fmt.Errorf("%w: it is no signed base64url", errSession)
	}
	return raw[:sha256.Size], raw[sha256.Size:], nil
}

// parseSession reads what is signed strictly: exactly the bytes that seal would write, with a UUID for each origin. It
// does not say who wrote it.
func parseSession(b []byte) (v session, err error) {
	if err := json.Unmarshal(b, &v); err != nil {
		return v, fmt.Errorf("%w: %w", errSession, err)
	}
	// Unknown fields, fields twice, other orders and spaces, and whatever follows.
	if same, err := json.Marshal(v); err != nil || !bytes.Equal(same, b) {
		return v, fmt.Errorf("%w: it is not in the form in which ids are made", errSession)
	}
	if v.V != sessionVersion || len(v.S) == 0 || len(v.S) > maxCopies {
		return v, fmt.Errorf("%w: version %d with %d origins", errSession, v.V, len(v.S))
	}
	if err := registry.CheckName(v.Repo); err != nil {
		return v, fmt.Errorf("%w: %w", errSession, err)
	}
	for _, p := range v.S {
		if u, err := uuid.Parse(p.Upload); err != nil || u.String() != p.Upload || p.Origin == "" {
			return v, fmt.Errorf("%w: %.80q at %.80q is no session of an origin", errSession, p.Upload, p.Origin)
		}
	}
	return v, nil
}

// target is one origin's half of a session.
type target struct {
	part
	origin *cluster.Origin
}

// open decodes an upload id. One that no proxy with this key made for repo is an unknown session.
func (p *Proxy) open(repo, id string) ([]target, error) {
	s, err := p.ids.unseal(id)
	if err == nil && s.Repo != repo {
		err = fmt.Errorf("%w: it is of another repository", errSession)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %.64q of repository %s: %w", registry.ErrBlobUploadUnknown, id, repo, err)
	}
	out := make([]target, 0, len(s.S))
	for _, pt := range s.S {
		o := p.origins.Get(pt.Origin)
		if o == nil {
			return nil, fmt.Errorf("%w: session names origin %.64q, which is not configured", registry.ErrBlobUploadUnknown, pt.Origin)
		}
		out = append(out, target{pt, o})
	}
	return out, nil
}

func (p *Proxy) encode(repo string, ts []target, offset int64) registry.Upload {
	s := session{V: sessionVersion, Repo: repo}
	for _, t := range ts {
		s.S = append(s.S, t.part)
	}
	return registry.Upload{ID: p.ids.seal(s), Offset: offset}
}
