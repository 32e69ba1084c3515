package origin

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kraken/origin/store"
	"kraken/proto/config"
)

// A session goes soon after its idle time, whatever that is, and stays as long as bytes come.
func TestIdleSessionsGo(t *testing.T) {
	for _, idle := range []time.Duration{4 * time.Second, time.Hour} {
		dir := t.TempDir()
		synctest.Test(t, func(t *testing.T) {
			s, err := store.Open(store.Config{Dir: dir})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			o := &Origin{cfg: Config{UploadIdle: config.Duration(idle)}, log: slog.New(slog.DiscardHandler), store: s, leases: newLeases(1), budgets: newBudgets()}
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() { ended <- o.housekeeping(ctx) }()
			u, err := s.NewUpload(store.UploadOptions{Size: -1})
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(idle * 3 / 4)
			if _, err := u.Write(ctx, 0, strings.NewReader("hello")); err != nil {
				t.Fatal(err)
			}
			time.Sleep(idle * 3 / 4)
			if _, err := s.Upload(u.ID()); err != nil {
				t.Errorf("idle for less than %v: %v", idle, err)
			}
			time.Sleep(idle*3/4 + 2*time.Second) // times are kept in whole seconds
			if _, err := s.Upload(u.ID()); !errors.Is(err, store.ErrUploadUnknown) {
				t.Errorf("idle for more than %v: %v, want ErrUploadUnknown", idle, err)
			}
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
}
