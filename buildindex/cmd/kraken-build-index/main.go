// Command kraken-build-index keeps names: manifests, tags, and which repository holds which blob.
package main

import (
	"kraken/buildindex"
	"kraken/proto/role"
)

func main() {
	role.Main("build-index", "manifests, tags, and which repository holds which blob", buildindex.New)
}
