package origin

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"kraken/proto/registry"
)

// TestTrouble: an origin that asks to come back is no trouble that the log warns of, unless another has some.
func TestTrouble(t *testing.T) {
	later := fmt.Errorf("hand over: %w", &registry.RetryError{Err: registry.ErrUnavailable, After: time.Second})
	down := errors.New("connection refused")
	for _, c := range []struct {
		name  string
		errs  []error
		later bool
	}{
		{"all verify", []error{later, later}, true},
		{"one is down", []error{down}, false},
		{"one is down, one verifies", []error{later, down, later}, false},
	} {
		if err := trouble(c.errs); err == nil || isLater(err) != c.later {
			t.Errorf("%s: %v, later %v", c.name, err, isLater(err))
		}
	}
	if err := trouble(nil); err != nil {
		t.Errorf("nothing failed: %v", err)
	}
}
