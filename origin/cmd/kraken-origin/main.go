// Command kraken-origin keeps blobs, seeds them, and writes them back to a bucket.
package main

import (
	"kraken/origin"
	"kraken/proto/role"
)

func main() { role.Main("origin", "keeps blobs, seeds them, writes them back to a bucket", origin.New) }
