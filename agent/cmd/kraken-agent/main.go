// Command kraken-agent runs on every node: a read-only registry on localhost that fetches blobs from the swarm.
package main

import (
	"kraken/agent"
	"kraken/proto/role"
)

func main() {
	role.Main("agent", "a registry on every node that pulls from the swarm", agent.New, agent.Jobs()...)
}
