package devcluster

import (
	"fmt"
	"net"
	"testing"
)

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
