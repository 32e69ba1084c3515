package announce

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"kraken/proto/blob"
)

// maxQuery bounds the query of a BEP 3 announce in bytes; what clients send is about 400.
const maxQuery = 4 << 10

// PeerID names a peer for the life of its process (BEP 3, BEP 20).
type PeerID [20]byte

// String is the hexadecimal form, as in batched announces.
func (id PeerID) String() string { return hex.EncodeToString(id[:]) }

// Query is a BEP 3 announce: the query of GET /announce.
type Query struct {
	InfoHash blob.InfoHash
	PeerID   PeerID
	// IP is what the client says of itself, the zero Addr when it says nothing or no IP literal. Only a tracker that is
	// told to trust it may use it: it lets anyone announce anyone.
	IP         netip.Addr
	Key        string // secret of the client's, at most MaxKey bytes, by which it is known at another address
	Port       uint16 // of the peer listener; 0: the client can't be dialled
	Uploaded   int64  // bytes, since EventStarted
	Downloaded int64  // bytes, since EventStarted
	Left       int64  // bytes still missing, -1 when not said
	Event      Event
	NumWant    int  // peers asked for, -1 when not said
	Compact    bool // BEP 23; true unless the client says compact=0
}

// ParseQuery takes the raw query of an announce. Keys that are not known are ignored; every error is an ErrInvalid.
func ParseQuery(raw string) (Query, error) {
	q := Query{Left: -1, NumWant: -1, Compact: true}
	if len(raw) > maxQuery {
		return q, fmt.Errorf("%w: a query of %d bytes, at most %d are allowed", ErrInvalid, len(raw), maxQuery)
	}
	seen := map[string]bool{}
	for pair := range strings.SplitSeq(raw, "&") {
		// url.ParseQuery is not used: it refuses a bare semicolon, which clients may leave in the binary fields.
		key, escaped, _ := strings.Cut(pair, "=")
		value, err := url.QueryUnescape(escaped)
		if err != nil {
			return q, fmt.Errorf("%w: %.20q: %w", ErrInvalid, key, err)
		}
		known, err := q.set(key, value)
		if err != nil {
			return q, err
		}
		if known && seen[key] {
			return q, fmt.Errorf("%w: %s is there twice", ErrInvalid, key)
		}
		seen[key] = known
	}
	for _, key := range []string{"info_hash", "peer_id", "port"} {
		if !seen[key] {
			return q, fmt.Errorf("%w: %s is missing", ErrInvalid, key)
		}
	}
	return q, nil
}

// set takes one value and says whether the key is known.
func (q *Query) set(key, v string) (known bool, err error) {
	switch key {
	case "info_hash":
		err = exactly(q.InfoHash[:], v)
	case "peer_id":
		err = exactly(q.PeerID[:], v)
	case "port":
		var n uint64
		n, err = strconv.ParseUint(v, 10, 16)
		q.Port = uint16(n)
	case "uploaded":
		q.Uploaded, err = count(v)
	case "downloaded":
		q.Downloaded, err = count(v)
	case "left":
		q.Left, err = count(v)
	case "numwant":
		var n int64
		if n, err = strconv.ParseInt(v, 10, 32); err == nil {
			q.NumWant = int(max(n, -1))
		}
	case "event":
		q.Event, err = queryEvent(v)
	case "key":
		if len(v) > MaxKey {
			err = fmt.Errorf("%d bytes, at most %d are allowed", len(v), MaxKey)
		}
		q.Key = v
	case "compact":
		q.Compact = v != "0"
	case "ip":
		if a, aerr := netip.ParseAddr(v); aerr == nil { // BEP 3 allows a DNS name too: not looked up
			q.IP = a.Unmap().WithZone("")
		}
	default:
		return false, nil
	}
	if err != nil {
		return true, fmt.Errorf("%w: %s %.60q: %w", ErrInvalid, key, v, err)
	}
	return true, nil
}

func exactly(into []byte, v string) error {
	if len(v) != len(into) {
		return fmt.Errorf("%d bytes, want %d", len(v), len(into))
	}
	copy(into, v)
	return nil
}

func count(v string) (int64, error) {
	n, err := strconv.ParseUint(v, 10, 63)
	return int64(n), err
}

// queryEvent takes "paused" (BEP 21) and the "empty" of old clients for a periodic announce.
func queryEvent(v string) (Event, error) {
	switch e := Event(v); e {
	case EventNone, EventStarted, EventCompleted, EventStopped:
		return e, nil
	case "paused", "empty":
		return EventNone, nil
	}
	return EventNone, fmt.Errorf("want started, completed or stopped")
}

// ReplyPeer is a peer in a Reply, once for each of its addresses.
type ReplyPeer struct {
	ID   PeerID // zero when not known; only sent where the client wants no compact form
	Addr netip.AddrPort
}

// Reply answers a Query.
type Reply struct {
	Interval   time.Duration // until the next periodic announce; rounded down to seconds, at least one
	Complete   int           // seeds
	Incomplete int           // leechers
	Peers      []ReplyPeer
	Warning    string // for people (BEP 3 "warning message"); empty for none
}

// Compact is the bencoded answer with peers (BEP 23) and peers6 (BEP 7).
func (r Reply) Compact() []byte {
	var v4, v6 []byte
	for _, p := range r.Peers {
		a := p.Addr.Addr().Unmap()
		if a.Is4() {
			v4 = binary.BigEndian.AppendUint16(append(v4, a.AsSlice()...), p.Addr.Port())
		} else if a.Is6() {
			v6 = binary.BigEndian.AppendUint16(append(v6, a.AsSlice()...), p.Addr.Port())
		}
	}
	b := r.counts(make([]byte, 0, 96+len(v4)+len(v6)))
	b = appendString(append(b, "5:peers"...), string(v4))
	if len(v6) > 0 {
		b = appendString(append(b, "6:peers6"...), string(v6))
	}
	return append(r.warning(b), 'e')
}

// Dictionaries is the bencoded answer of BEP 3 proper: a list of dictionaries with ip, peer id and port, both families
// in one.
func (r Reply) Dictionaries() []byte {
	b := append(r.counts(make([]byte, 0, 96+80*len(r.Peers))), "5:peersl"...)
	for _, p := range r.Peers {
		b = appendString(append(b, "d2:ip"...), p.Addr.Addr().Unmap().String())
		if p.ID != (PeerID{}) {
			b = appendString(append(b, "7:peer id"...), string(p.ID[:]))
		}
		b = append(appendInt(append(b, "4:port"...), int64(p.Addr.Port())), 'e')
	}
	return append(r.warning(append(b, 'e')), 'e')
}

// warning comes last in the order of keys.
func (r Reply) warning(b []byte) []byte {
	if r.Warning == "" {
		return b
	}
	return appendString(append(b, "15:warning message"...), r.Warning)
}

// counts opens the dictionary with all that sorts before "peers".
func (r Reply) counts(b []byte) []byte {
	b = appendInt(append(b, "d8:complete"...), int64(r.Complete))
	b = appendInt(append(b, "10:incomplete"...), int64(r.Incomplete))
	return appendInt(append(b, "8:interval"...), max(1, int64(r.Interval/time.Second)))
}

// Failure is the bencoded answer that tells a person why there is no other (BEP 3 "failure reason").
func Failure(reason string) []byte {
	return append(appendString([]byte("d14:failure reason"), reason), 'e')
}

func appendString(b []byte, s string) []byte {
	return append(append(strconv.AppendInt(b, int64(len(s)), 10), ':'), s...)
}

func appendInt(b []byte, n int64) []byte {
	return append(strconv.AppendInt(append(b, 'i'), n, 10), 'e')
}
