// Package announce is the agreement about who has what: the BEP 3 announce that any BitTorrent client speaks, and the
// batched announce of Kraken's own agents, which answers with metainfo, peers and origins in one round trip.
package announce

import (
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/ring"
)

// Version is the version of the batched announce; a tracker refuses a greater one with 400.
const Version = 1

// Limits of one batched announce. A tracker refuses more with 413.
const (
	MaxBlobs = 1000
	MaxBody  = 1 << 20 // bytes of a request
)

// Event is what happened to a blob at the announcing peer (BEP 3 "event").
type Event string

// Events. The empty event is the periodic announce.
const (
	EventNone      Event = ""
	EventStarted   Event = "started"
	EventCompleted Event = "completed"
	EventStopped   Event = "stopped"
)

// Peer is a node that speaks the peer protocol.
type Peer struct {
	ID   string   `json:"id"`             // peer id, 40 hex digits
	Addr []string `json:"addr"`           // ip:port of the peer listener, at most one of each family
	Node string   `json:"node,omitempty"` // name for people
	// Key is a secret of the peer's, at most MaxKey bytes; only in requests. While a peer lives, its id belongs to who
	// announced it first: who shows the same key may go on from another address.
	Key string `json:"key,omitempty"`
	// Complete says that the peer has the whole blob; only in answers.
	Complete bool `json:"complete,omitempty"`
}

// LeftUnknown is BlobState.Left of a blob of which the peer knows no size.
const LeftUnknown = -1

// BlobState is what a peer says of one blob.
type BlobState struct {
	Digest     digest.Digest `json:"digest"`
	Repository string        `json:"repository,omitempty"` // some repository it is pulled from
	Event      Event         `json:"event,omitempty"`
	Size       int64         `json:"size,omitempty"` // bytes, 0 when not known yet
	Left       int64         `json:"left"`           // bytes still missing; 0 once complete, or LeftUnknown
	Uploaded   int64         `json:"uploaded,omitempty"`
	Downloaded int64         `json:"downloaded,omitempty"`
	// Want asks for peers and origins, NeedMetainfo for the metainfo as well.
	Want         bool `json:"want,omitempty"`
	NeedMetainfo bool `json:"need_metainfo,omitempty"`
}

// Request is POST /announce.
type Request struct {
	Version int         `json:"version"`
	Peer    Peer        `json:"peer"`
	Blobs   []BlobState `json:"blobs"`
}

// BlobAnswer is what the tracker knows of one wanted blob.
type BlobAnswer struct {
	Digest   digest.Digest `json:"digest"`
	Metainfo []byte        `json:"metainfo,omitempty"` // as proto/blob's Marshal; absent when no origin has it yet
	Peers    []Peer        `json:"peers,omitempty"`
	Origins  []ring.Member `json:"origins,omitempty"` // owners, best first
	Error    string        `json:"error,omitempty"`   // why metainfo is absent
}

// Response answers a Request. Interval is the time until the next periodic announce.
type Response struct {
	Version  int           `json:"version"`
	Interval time.Duration `json:"interval_ns"`
	// Warning says what of the request was not believed or not kept, for people.
	Warning string       `json:"warning,omitempty"`
	Blobs   []BlobAnswer `json:"blobs"`
}
