package audit

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// Each event is one whole line of one file, whoever writes while the file is moved away again and again.
func TestRotationLosesNothing(t *testing.T) {
	const writers, each, rotations = 4, 200, 50
	dir := t.TempDir()
	name := filepath.Join(dir, "audit")
	a, err := Open(name, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				a.Write(Event{Event: Change, RequestID: fmt.Sprint(w, i)})
			}
		})
	}
	wg.Go(func() {
		for i := range rotations {
			if err := os.Rename(name, fmt.Sprint(name, i)); err != nil && !os.IsNotExist(err) {
				t.Error(err)
			}
			a.Write(Event{Event: Refused})
		}
	})
	wg.Wait()
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	files, err := filepath.Glob(name + "*")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
			var e Event
			if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
				t.Fatalf("%s: %q: %v", f, lines.Text(), err)
			}
			seen[e.Event+e.RequestID]++
		}
	}
	if n := len(seen); n != writers*each+1 || seen[Refused] != rotations || len(files) < 2 {
		t.Errorf("%d events in %d files, %d of the kind %s", n, len(files), seen[Refused], Refused)
	}
}

// Of no file, and of no Log, nothing is written.
func TestNoFile(t *testing.T) {
	var none *Log
	a, err := Open("", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range []*Log{none, a} {
		l.Write(Event{Event: Change})
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
}
