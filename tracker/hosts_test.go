package tracker

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"
)

func TestHosts(t *testing.T) {
	h := newHosts()
	var asked int
	var fail error
	h.lookup = func(_ context.Context, network, host string) ([]netip.Addr, error) {
		asked++
		if host != "origin.example" || network != "ip" {
			t.Errorf("lookup of %s %s", network, host)
		}
		return []netip.Addr{netip.MustParseAddr("::ffff:10.0.0.1"), netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("2001:db8::1")}, fail
	}
	want := []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:7"), netip.MustParseAddrPort("[2001:db8::1]:7")}
	for range 3 {
		if got, err := h.resolve(t.Context(), "origin.example:7"); err != nil || !slices.Equal(got, want) {
			t.Errorf("%v, %v", got, err)
		}
	}
	if asked != 1 {
		t.Errorf("asked %d times", asked)
	}
	fail = errors.New("no such host")
	h.known["origin.example:7"] = resolved{addrs: want} // old
	if got, err := h.resolve(t.Context(), "origin.example:7"); err != nil || !slices.Equal(got, want) {
		t.Errorf("while names can't be resolved: %v, %v", got, err)
	}
	if got, err := h.resolve(t.Context(), "[::ffff:10.0.0.3]:9"); err != nil || !slices.Equal(got, []netip.AddrPort{netip.MustParseAddrPort("10.0.0.3:9")}) {
		t.Errorf("a literal: %v, %v", got, err)
	}
	for _, bad := range []string{"", "origin.example", "origin.example:http", "origin.example:8"} {
		if _, err := h.resolve(t.Context(), bad); err == nil {
			t.Errorf("%q is resolved", bad)
		}
	}
}
