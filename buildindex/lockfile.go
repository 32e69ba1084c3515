package buildindex

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
)

// errBusy is that another process has the database.
var errBusy = errors.New("another build-index has this database")

// lockFile makes this process the only one that has a database, or returns errBusy with who has it. The kernel ends the
// lock with the process, however that ends.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		who, _ := os.ReadFile(path) // to name it; the lock is what counts
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = fmt.Errorf("%w: %.200s (lock %s): stop it, or give this one its own database, origins and bucket", errBusy, strings.TrimSpace(string(who)), path)
		}
		return nil, errors.Join(err, f.Close())
	}
	host, _ := os.Hostname()
	if err = f.Truncate(0); err == nil {
		_, err = fmt.Fprintf(f, "process %d on %s\n", os.Getpid(), host)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	return f, nil
}
