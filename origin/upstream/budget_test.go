package upstream

import (
	"errors"
	"fmt"
	"testing"

	"kraken/proto/registry"
)

// One registry takes an eighth of a budget, and all that are made up half of it; what is given back is there again.
func TestBudget(t *testing.T) {
	b := NewBudget("things", 16)
	of := func(host, pattern string) *Registry {
		return &Registry{Host: host, RegistryConfig: RegistryConfig{Registry: pattern}}
	}
	var held []func()
	take := func(r *Registry, want int) {
		t.Helper()
		for got := 0; ; got++ {
			release, err := b.Take(r)
			if err == nil {
				held = append(held, release)
				continue
			}
			if got != want || !errors.Is(err, registry.ErrUnavailable) {
				t.Errorf("%s has %d, %v; want %d", r.Host, got, err, want)
			}
			return
		}
	}
	for i := range 6 {
		take(of(fmt.Sprintf("r%d.evil.example", i), "*"), []int{2, 2, 2, 2, 0, 0}[i])
	}
	take(of("docker.io", "docker.io"), 2)
	for _, release := range held {
		release()
		release()
	}
	if b.taken != 0 || b.named != 0 || len(b.hosts) != 0 {
		t.Errorf("left: %+v", b)
	}
	for i := range 9 {
		take(of(fmt.Sprintf("r%d.example", i), fmt.Sprintf("r%d.example", i)), []int{2, 2, 2, 2, 2, 2, 2, 2, 0}[i])
	}
}
