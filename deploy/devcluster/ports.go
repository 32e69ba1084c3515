package devcluster

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"syscall"

	"kraken/proto/transport"
)

// Free ports are taken from below the range that the kernel gives outgoing connections (32768 and up), so that no
// connection gets one between the choice and the listener. Each process takes them from segments that are its own while
// it runs, so that no other cluster gets one in that time either.
const (
	firstFree, countFree = 20_000, 12_000
	segmentSize          = 200
)

// segments are this process's. It is safe for concurrent use.
type segments struct {
	space string // whose processes share the ports, in the names of sockets; of all but tests it is empty

	mu    sync.Mutex
	first []int          // port of each
	held  []net.Listener // what keeps others from them
	next  int            // of all their ports, the one to look at next
}

var own segments

// claim adds a segment that no other process has. An abstract socket of its name, which the kernel removes with the
// process, says whose it is.
func (s *segments) claim() error {
	const count = countFree / segmentSize
	start := rand.IntN(count)
	for i := range count {
		k := (start + i) % count
		l, err := net.Listen("unix", fmt.Sprintf("@kraken-devcluster-ports%s-%d", s.space, k))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err == nil {
			s.held = append(s.held, l)
		} // else there are no such sockets: the ports are taken on trust
		s.first = append(s.first, firstFree+k*segmentSize)
		return nil
	}
	return fmt.Errorf("the ports from %d to %d are kept by other processes", firstFree, firstFree+countFree-1)
}

// pick returns a port that is free now and not in taken.
func (s *segments) pick(taken map[int]bool) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		for range len(s.first) * segmentSize {
			at := s.next % (len(s.first) * segmentSize)
			s.next = at + 1
			port := s.first[at/segmentSize] + at%segmentSize
			if taken[port] {
				continue
			}
			l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
			if err != nil {
				continue
			}
			return port, l.Close()
		}
		if err := s.claim(); err != nil {
			return 0, err
		}
	}
}

// freePorts returns n different ports that are free now and not in taken, and adds them to it.
func freePorts(n int, taken map[int]bool) ([]int, error) {
	var out []int
	for range n {
		port, err := own.pick(taken)
		if err != nil {
			return nil, fmt.Errorf("find %d free ports: %w", n, err)
		}
		taken[port] = true
		out = append(out, port)
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
