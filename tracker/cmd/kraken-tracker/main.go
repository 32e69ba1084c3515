// Command kraken-tracker knows which node has which blob, and shows it.
package main

import (
	"kraken/proto/role"
	"kraken/tracker"
)

func main() { role.Main("tracker", "who has what, in one round trip", tracker.New) }
