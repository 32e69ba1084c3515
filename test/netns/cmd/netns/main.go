// Command netns makes and removes a network of namespaces for tests that are not in Go.
//
//	netns up TAG NODE...         make it; print each node's ip and namespace as JSON, for devcluster's --layout
//	netns rate TAG MBIT NODE...  limit the nodes' links in both directions; 0 takes the limit away
//	netns down TAG               remove it
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"

	"kraken/deploy/devcluster"
	"kraken/test/netns"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "netns:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return errors.New("want up TAG NODE..., rate TAG MBIT NODE... or down TAG")
	}
	verb, tag, rest := args[0], args[1], args[2:]
	if verb == "up" {
		return up(tag, rest)
	}
	n, err := netns.Open(tag)
	if err != nil {
		return err
	}
	switch {
	case verb == "down" && len(rest) == 0:
		return n.Close()
	case verb == "rate" && len(rest) > 1:
		mbit, err := strconv.Atoi(rest[0])
		if err != nil || mbit < 0 {
			return fmt.Errorf("rate %q: want Mbit/s", rest[0])
		}
		nodes, err := n.Find(rest[1:]...)
		if err != nil {
			return err
		}
		return n.Shape(mbit, nodes...)
	}
	return fmt.Errorf("%q: want up TAG NODE..., rate TAG MBIT NODE... or down TAG", args)
}

func up(tag string, names []string) error {
	n, err := netns.New(tag, names...)
	if err != nil {
		return err
	}
	hosts := map[string]devcluster.Host{}
	for _, x := range n.Nodes {
		hosts[x.Name] = x.Host
	}
	return json.NewEncoder(os.Stdout).Encode(hosts)
}
