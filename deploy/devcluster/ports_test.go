package devcluster

import (
	"fmt"
	"net"
	"os"
	"testing"
)

// A segment is one process's, and given once: where one has them all there is none for another.
func TestSegmentsAreOneProcessOwn(t *testing.T) {
	space := fmt.Sprint("-of-test-", os.Getpid()) // takes none from other processes
	one, two := segments{space: space}, segments{space: space}
	t.Cleanup(func() {
		for _, l := range append(one.held, two.held...) {
			l.Close()
		}
	})
	has := map[int]bool{}
	for range countFree / segmentSize {
		if err := one.claim(); err != nil {
			t.Fatal(err)
		}
		has[one.first[len(one.first)-1]] = true
	}
	if n := countFree / segmentSize; len(has) != n {
		t.Errorf("of %d segments %d are others", n, len(has))
	}
	for _, s := range []*segments{&one, &two} {
		if err := s.claim(); err == nil {
			t.Errorf("the segment from %d on is given twice", s.first[len(s.first)-1])
		}
	}
	for _, l := range one.held {
		l.Close()
	}
	if err := two.claim(); err != nil {
		t.Errorf("when the first has gone: %v", err)
	}
}

// Two processes never choose the same port, whatever they have chosen and not yet listened at.
func TestFreePortsAreOneProcessOwn(t *testing.T) {
	var one, two segments
	t.Cleanup(func() {
		for _, l := range append(one.held, two.held...) {
			l.Close()
		}
	})
	const many = segmentSize + 50 // more than a segment has
	chosen := map[int]bool{}
	known := []map[int]bool{{}, {}} // what each has chosen itself
	for range many {
		for i, s := range []*segments{&one, &two} {
			port, err := s.pick(known[i])
			if err != nil {
				t.Fatal(err)
			}
			if chosen[port] {
				t.Fatalf("port %d was chosen twice", port)
			}
			chosen[port], known[i][port] = true, true
		}
	}
	for _, a := range one.first {
		for _, b := range two.first {
			if a == b {
				t.Errorf("both have the ports from %d on", a)
			}
		}
	}
	used, err := one.pick(chosen)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", used))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for range 3 * segmentSize {
		if port, err := one.pick(map[int]bool{}); err != nil || port == used {
			t.Fatalf("port %d, which is in use, is chosen (%v)", port, err)
		}
	}
}
