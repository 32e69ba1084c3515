package store

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"
)

func TestWriteLastBeginsAgain(t *testing.T) {
	cut := func(s string) io.Reader {
		return io.MultiReader(strings.NewReader(s), iotest.ErrReader(errors.New("cut on purpose")))
	}
	write := func(off int64, s string) func(*Upload) {
		return func(u *Upload) { u.Write(context.Background(), off, strings.NewReader(s)) }
	}
	last := func(s string) func(*Upload) {
		return func(u *Upload) { u.WriteLast(context.Background(), strings.NewReader(s)) }
	}
	broken := func(s string) func(*Upload) {
		return func(u *Upload) { u.WriteLast(context.Background(), cut(s)) }
	}
	for name, steps := range map[string][]func(*Upload){
		"at once":               {last("hello world")},
		"the whole again":       {broken("hello"), last("hello world")},
		"thrice":                {broken("hello wo"), broken("he"), last("hello world")},
		"the end again":         {write(0, "hello "), broken("wor"), last("world")},
		"whole, not committed":  {last("hello world"), last("hello world")},
		"goes on":               {broken("hello"), (*Upload).Resync, last(" world")},
		"goes on with a chunk":  {broken("hello"), write(5, " wor"), last("ld")},
		"a chunk of its length": {last("hello"), write(-1, " world")},
	} {
		s := open(t, Config{Dir: t.TempDir()})
		u, err := s.NewUpload(UploadOptions{Size: 11, Source: "192.0.2.1"})
		if err != nil {
			t.Fatal(err)
		}
		for _, step := range steps {
			step(u)
		}
		if i, err := u.Commit(t.Context(), digest.FromString("hello world"), nil); err != nil || i.Size != 11 {
			t.Errorf("%s: %+v, %v", name, i, err)
		}
		s.mu.Lock()
		if left := s.sessions.sources["192.0.2.1"]; left.bytes != 0 || s.used < 0 {
			t.Errorf("%s: %d bytes of the source are counted, %d in all", name, left.bytes, s.used)
		}
		s.mu.Unlock()
	}
}
