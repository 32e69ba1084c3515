package devcluster

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"syscall"

	"kraken/proto/transport"
)

// Free ports are taken from below the range that the kernel gives outgoing connections (32768 and up), so that no
// connection gets one between the choice and the listener; and from a random place on, for the sake of other clusters.
const firstFree, countFree = 20_000, 12_000

// freePorts returns n different ports that are free now and not in taken, and adds them to it.
func freePorts(n int, taken map[int]bool) ([]int, error) {
	var out []int
	start := rand.IntN(countFree)
	for i := 0; len(out) < n && i < countFree; i++ {
		port := firstFree + (start+i)%countFree
		if taken[port] {
			continue
		}
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		l.Close()
		taken[port] = true
		out = append(out, port)
	}
	if len(out) < n {
		return nil, fmt.Errorf("find %d free ports from %d on: %d are", n, firstFree, len(out))
	}
	return out, nil
}

// checkPorts names every port that is taken, and who has it where that can be known.
func (cl *Cluster) checkPorts() error {
	var errs []error
	for _, c := range cl.Components {
		for _, a := range c.ports() {
			err := c.Host().Enter(func() error {
				l, err := net.Listen("tcp", a)
				if err != nil {
					return err
				}
				return l.Close()
			})
			if errors.Is(err, syscall.EADDRINUSE) {
				who := transport.PortOwner(a)
				if who == "" {
					who = "another process"
				}
				errs = append(errs, fmt.Errorf("port %s, needed by %s, is taken by %s", a, c.Name, who))
			} else if err != nil {
				errs = append(errs, fmt.Errorf("listen for %s: %w", c.Name, err))
			}
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("%w\nnothing was started; end what holds the ports, or an earlier cluster with `make stop-devcluster`", errors.Join(errs...))
	}
	return nil
}
