// Command kraken-proxy is the front door of a cluster: a full OCI registry that keeps nothing itself. Its other
// commands say who may do what, and make and revoke the keys of robots.
package main

import (
	"kraken/proto/role"
	"kraken/proxy"
)

func main() {
	role.Main("proxy", "the registry that people and CI push to", proxy.New, proxy.Jobs()...)
}
