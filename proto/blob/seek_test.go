package blob

import (
	"io"
	"testing"
)

func TestSeek(t *testing.T) {
	for _, c := range []struct {
		off    int64
		whence int
		want   int64 // -1: refused
	}{
		{0, io.SeekStart, 0}, {9, io.SeekStart, 9}, {200, io.SeekStart, 200}, {-1, io.SeekStart, -1},
		{0, io.SeekCurrent, 40}, {-40, io.SeekCurrent, 0}, {-41, io.SeekCurrent, -1},
		{0, io.SeekEnd, 100}, {-100, io.SeekEnd, 0}, {-101, io.SeekEnd, -1},
		{0, 3, -1}, {0, -1, -1},
	} {
		got, err := Seek(c.off, c.whence, 40, 100)
		if (err != nil) != (c.want < 0) || err == nil && got != c.want {
			t.Errorf("Seek(%d, %d) at 40 of 100: %d, %v; want %d", c.off, c.whence, got, err, c.want)
		}
	}
}
