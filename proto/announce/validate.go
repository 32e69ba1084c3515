package announce

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"kraken/proto/blob"
)

// Errors of messages. A tracker answers ErrTooLarge with 413 and the others with 400.
var (
	ErrInvalid  = errors.New("announce invalid")
	ErrVersion  = errors.New("announce of an unknown version")
	ErrTooLarge = errors.New("announce too large")
)

// MaxKey bounds a peer's key in bytes.
const MaxKey = 64

// maxName bounds names of nodes and repositories in bytes.
const maxName = 255

// ParseRequest decodes and validates the body of a batched announce. Fields that are not known are ignored.
func ParseRequest(body []byte) (Request, error) {
	var r Request
	if len(body) > MaxBody {
		return r, fmt.Errorf("%w: %d bytes, at most %d are allowed", ErrTooLarge, len(body), MaxBody)
	}
	if err := json.Unmarshal(body, &r); err != nil {
		return r, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return r, r.Validate()
}

// Validate checks every bound of a request: what passes is safe to keep.
func (r *Request) Validate() error {
	switch {
	case r.Version > Version:
		return fmt.Errorf("%w: version %d, this is version %d", ErrVersion, r.Version, Version)
	case r.Version < 1:
		return fmt.Errorf("%w: version %d, want %d", ErrInvalid, r.Version, Version)
	case len(r.Blobs) > MaxBlobs:
		return fmt.Errorf("%w: %d blobs, at most %d are allowed", ErrTooLarge, len(r.Blobs), MaxBlobs)
	}
	if err := r.Peer.validate(); err != nil {
		return fmt.Errorf("%w: peer: %w", ErrInvalid, err)
	}
	for i := range r.Blobs {
		if err := r.Blobs[i].validate(); err != nil {
			return fmt.Errorf("%w: blobs[%d]: %w", ErrInvalid, i, err)
		}
	}
	return nil
}

func (p *Peer) validate() error {
	if _, err := p.PeerID(); err != nil {
		return err
	}
	if len(p.Node) > maxName || !utf8.ValidString(p.Node) || strings.ContainsFunc(p.Node, unicode.IsControl) {
		return fmt.Errorf("node %.40q: want at most %d bytes of printable UTF-8", p.Node, maxName)
	}
	if len(p.Key) > MaxKey {
		return fmt.Errorf("key of %d bytes, at most %d are allowed", len(p.Key), MaxKey)
	}
	_, err := p.Addrs()
	return err
}

// PeerID is the peer id in its binary form.
func (p *Peer) PeerID() (PeerID, error) {
	var id PeerID
	if len(p.ID) != hex.EncodedLen(len(id)) {
		return id, fmt.Errorf("id of %d characters, want %d hex digits", len(p.ID), hex.EncodedLen(len(id)))
	}
	if _, err := hex.Decode(id[:], []byte(p.ID)); err != nil {
		return id, fmt.Errorf("id: %w", err)
	}
	return id, nil
}

// Addrs are the addresses in their binary form, the zero value for a family that is not there. A peer without any can
// ask, and is given to nobody.
func (p *Peer) Addrs() (a [2]netip.AddrPort, err error) {
	if len(p.Addr) > len(a) {
		return a, fmt.Errorf("%d addresses, at most one of each family is allowed", len(p.Addr))
	}
	for _, s := range p.Addr {
		ap, err := netip.ParseAddrPort(s)
		if err != nil {
			return a, fmt.Errorf("address %.60q: want ip:port", s)
		}
		ip := ap.Addr().Unmap()
		if !Dialable(netip.AddrPortFrom(ip, ap.Port())) {
			return a, fmt.Errorf("address %s can't be dialled by others", ap)
		}
		family := 0
		if ip.Is6() {
			family = 1
		}
		if a[family].IsValid() {
			return a, fmt.Errorf("address %s: at most one of each family is allowed", ap)
		}
		a[family] = netip.AddrPortFrom(ip, ap.Port())
	}
	return a, nil
}

// metadata are the addresses at which clouds give secrets to whoever asks from one of their machines and that are not
// link-local: Azure's, Alibaba's and Oracle's, and Amazon's IPv6 one.
var metadata = []netip.Addr{
	netip.MustParseAddr("168.63.129.16"), netip.MustParseAddr("100.100.100.200"), netip.MustParseAddr("192.0.0.192"), netip.MustParseAddr("fd00:ec2::254"),
}

// Dialable reports whether an address may be given to others to dial: a unicast IP address without a zone, and a port.
// Link-local addresses are not: they mean another machine on each link, and on most clouds the one with the machine's
// secrets.
func Dialable(ap netip.AddrPort) bool {
	a := ap.Addr().Unmap()
	return ap.IsValid() && ap.Port() != 0 && a.Zone() == "" && !a.IsUnspecified() && !a.IsMulticast() && !a.IsLinkLocalUnicast() &&
		a != netip.AddrFrom4([4]byte{255, 255, 255, 255}) && !slices.Contains(metadata, a)
}

func (s *BlobState) validate() error {
	if _, err := blob.ParseDigest(s.Digest.String()); err != nil {
		return err
	}
	switch s.Event {
	case EventNone, EventStarted, EventCompleted, EventStopped:
	default:
		return fmt.Errorf("event %.20q: want started, completed, stopped or none", string(s.Event))
	}
	if len(s.Repository) > maxName {
		return fmt.Errorf("repository of %d bytes, at most %d are allowed", len(s.Repository), maxName)
	}
	if s.Size < 0 || s.Size > blob.MaxSize {
		return fmt.Errorf("size %d is not in 0..%d", s.Size, int64(blob.MaxSize))
	}
	if s.Left < LeftUnknown || s.Left > blob.MaxSize {
		return fmt.Errorf("left %d is not in -1..%d", s.Left, int64(blob.MaxSize))
	}
	if s.Uploaded < 0 || s.Downloaded < 0 {
		return fmt.Errorf("uploaded %d, downloaded %d: must not be negative", s.Uploaded, s.Downloaded)
	}
	return nil
}
