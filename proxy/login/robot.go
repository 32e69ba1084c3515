package login

import (
	"crypto/rand"
	"encoding/base64"
	"time"

	"kraken/proto/cluster"
)

// keyPrefix makes a robot's key known to programs that look for leaked secrets.
const keyPrefix = "krk_"

// NewRobot makes a robot with a key of 256 random bits. The robot has only the key's hash; build-index gives it a
// generation.
func NewRobot(name, note string, now time.Time, life time.Duration) (r cluster.Robot, key string) {
	b := make([]byte, 32)
	rand.Read(b) // never fails
	key = keyPrefix + base64.RawURLEncoding.EncodeToString(b)
	now = now.UTC().Truncate(time.Second)
	return cluster.Robot{Name: name, Hash: hashOf(key), Created: now, Expires: now.Add(life), Note: note}, key
}
