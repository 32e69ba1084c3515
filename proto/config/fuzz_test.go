package config

import (
	"math"
	"testing"
)

// FuzzUnits reads sizes, rates and durations: what is taken is in bounds, and is read back from what is written of it.
func FuzzUnits(f *testing.F) {
	for _, s := range []string{"64MiB", "1.5 GB", "25Mbit/s", "NaNbit", "1e400Gbit/s", "-1", "0x10", "1h30m", "9223372036854775807", "1,5MiB", "0bit/s", "Inf"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var size Size
		if size.UnmarshalText([]byte(s)) == nil && (size < 0 || size > 1<<62) {
			t.Errorf("size %q is %d", s, size)
		}
		var rate, again Rate
		if rate.UnmarshalText([]byte(s)) == nil {
			text, err := rate.MarshalText()
			if rate < 0 || rate > 1<<62 || err != nil || again.UnmarshalText(text) != nil || again != rate {
				t.Errorf("rate %q is %d, written %q, read back %d", s, rate, text, again)
			}
		}
		var d, back Duration
		if d.UnmarshalText([]byte(s)) == nil && d != math.MinInt64 {
			if err := back.UnmarshalText([]byte(d.String())); err != nil || back != d {
				t.Errorf("duration %q is %s, read back %s, %v", s, d, back, err)
			}
		}
	})
}
