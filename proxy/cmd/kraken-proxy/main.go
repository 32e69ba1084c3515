// Command kraken-proxy is the front door of a cluster: a full OCI registry that keeps nothing itself.
package main

import (
	"kraken/proto/role"
	"kraken/proxy"
)

func main() { role.Main("proxy", "the registry that people and CI push to", proxy.New) }
