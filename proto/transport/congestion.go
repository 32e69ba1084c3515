package transport

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// What CongestionControl of a listener may be beside a name.
const (
	// CongestionSystem is what the system uses.
	CongestionSystem = "system"
	// CongestionFair is what the system uses unless that is BBR: then it is cubic, where this process may use it. BBR paces itself to
	// the share of a link that it had lately. Beside many senders that fill the link's queue that is little, and stays little.
	CongestionFair = "fair"
)

// ErrCongestionControl is the name of a congestion control that can't be used here.
var ErrCongestionControl = errors.New("congestion control is not to be had")

// congestion returns what net.ListenConfig.Control is to do for a choice: connections inherit the listener's congestion control
// (TCP_CONGESTION of tcp(7)).
func congestion(choice string) func(network, addr string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) { err = setCongestion(int(fd), choice) })
		return errors.Join(cerr, err)
	}
}

func setCongestion(fd int, choice string) error {
	now, err := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	if err != nil && choice != "" && choice != CongestionSystem && choice != CongestionFair {
		return fmt.Errorf("%w: %s: %w", ErrCongestionControl, choice, err)
	}
	name := congestionName(choice, now)
	if name == "" {
		return nil
	}
	err = unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, name)
	if err == nil || choice == CongestionFair { // it works without, just not as well
		return nil
	}
	return fmt.Errorf("%w: %s: %w; this system has %s, and an ordinary process may use %s", ErrCongestionControl, name, err,
		sysctl("tcp_available_congestion_control"), sysctl("tcp_allowed_congestion_control"))
}

// congestionName is what is to be set, where now is in use; empty for nothing.
func congestionName(choice, now string) string {
	switch choice {
	case "", CongestionSystem, now:
		return ""
	case CongestionFair:
		if strings.HasPrefix(now, "bbr") {
			return "cubic"
		}
		return ""
	}
	return choice
}

// sysctl is a setting of the network namespace, for messages.
func sysctl(name string) string {
	b, err := os.ReadFile("/proc/sys/net/ipv4/" + name)
	if err != nil {
		return "what can't be read here"
	}
	return strings.TrimSpace(string(b))
}
