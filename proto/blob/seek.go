package blob

import (
	"fmt"
	"io"
)

// Seek returns where a reader of size bytes stands after Seek(off, whence) at byte pos, as io.Seeker says. To be
// before the first byte is an error; to be behind the last one is none: a read finds the end there.
func Seek(off int64, whence int, pos, size int64) (int64, error) {
	switch whence {
	case io.SeekStart:
	case io.SeekCurrent:
		off += pos
	case io.SeekEnd:
		off += size
	default:
		return 0, fmt.Errorf("seek from %d: no such place to count from", whence)
	}
	if off < 0 {
		return 0, fmt.Errorf("seek to %d: before the start of the blob", off)
	}
	return off, nil
}
