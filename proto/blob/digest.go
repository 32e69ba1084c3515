// Package blob says what a blob is: its digest, its size, its pieces, its metainfo and its info-hash. It is pure, and
// every role computes the same bytes from it. It knows neither disks nor networks.
package blob

import (
	_ "crypto/sha256" // the algorithms that go-digest is asked for
	_ "crypto/sha512"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
)

// ErrDigestInvalid is a digest that is malformed or of an algorithm other than sha256 and sha512.
var ErrDigestInvalid = errors.New("digest is malformed or of an unknown algorithm")

// ParseDigest accepts sha256:<64 lower hex> and sha512:<128 lower hex> and nothing else, so that a digest is a safe
// path.
func ParseDigest(s string) (digest.Digest, error) {
	d := digest.Digest(s)
	if len(s) > len("sha512:")+128 {
		return "", fmt.Errorf("%w: %d characters", ErrDigestInvalid, len(s))
	}
	if err := d.Validate(); err != nil {
		return "", fmt.Errorf("%w: %q", ErrDigestInvalid, s)
	}
	if a := d.Algorithm(); a != digest.SHA256 && a != digest.SHA512 {
		return "", fmt.Errorf("%w: %q", ErrDigestInvalid, s)
	}
	return d, nil
}

// fromHex is the digest whose hexadecimal part is h: its length tells the algorithm.
func fromHex(h string) (digest.Digest, error) {
	switch len(h) {
	case 64:
		return ParseDigest("sha256:" + h)
	case 128:
		return ParseDigest("sha512:" + h)
	}
	return "", fmt.Errorf("%w: %d hex digits", ErrDigestInvalid, len(h))
}
