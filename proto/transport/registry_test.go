package transport

import (
	"slices"
	"testing"
)

func TestRegistryOfAProcess(t *testing.T) {
	families, err := NewRegistry("agent").Gather()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range families {
		names = append(names, f.GetName())
	}
	for _, want := range []string{"kraken_build_info", "go_goroutines", "process_resident_memory_bytes", "process_cpu_seconds_total"} {
		if !slices.Contains(names, want) {
			t.Errorf("no %s among %v", want, names)
		}
	}
}
