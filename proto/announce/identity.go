package announce

import (
	"crypto/sha256"
	"encoding/base64"

	"kraken/proto/transport"
)

// OwnPrefix begins the peer ids of this version's nodes (BEP 20).
const OwnPrefix = "-KN0001-"

// PeerIDOf returns the peer id of a node whose certificate names it: OwnPrefix, and of the SHA-256 of the identity's
// text 9 bytes in base64url. Nobody else may have it, and the node no other.
func PeerIDOf(p transport.Principal) (id PeerID) {
	sum := sha256.Sum256([]byte("kraken peer id\x00" + p.String()))
	copy(id[:], OwnPrefix)
	base64.RawURLEncoding.Encode(id[len(OwnPrefix):], sum[:9])
	return id
}
