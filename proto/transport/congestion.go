package transport

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// What CongestionControl may be beside a name.
const (
	// CongestionSystem is what the system uses.
	CongestionSystem = "system"
	// CongestionAuto is what the system uses, but cubic in place of BBR on short paths. BBR paces itself to the share
	// of a link that it had lately; beside many senders that fill the link's queue that is little, and stays little. On
	// long paths, which lose segments without being full, it is better than cubic.
	CongestionAuto = "auto"
)

// longRoundTrip is from where on CongestionAuto leaves a path alone.
const longRoundTrip = 10 * time.Millisecond

// ErrCongestionControl is the name of a congestion control that can't be used here.
var ErrCongestionControl = errors.New("congestion control is not to be had")

// listenConfig is for a listener whose connections inherit the congestion control of a name (TCP_CONGESTION of tcp(7)).
func listenConfig(choice string) (lc net.ListenConfig) {
	if choice == "" || choice == CongestionSystem || choice == CongestionAuto {
		return lc
	}
	lc.Control = func(_, _ string, c syscall.RawConn) error {
		err := setCongestion(c, choice)
		if err != nil {
			err = fmt.Errorf("%w: %s: %w; this system has %s, and an ordinary process may use %s", ErrCongestionControl, choice, err,
				sysctl("tcp_available_congestion_control"), sysctl("tcp_allowed_congestion_control"))
		}
		return err
	}
	return lc
}

// avoidBBR is CongestionAuto for a connection, which works without as well. done: there is no more to do, as far as is
// known of the path.
func avoidBBR(c net.Conn) (done bool, err error) {
	tc := tcpOf(c)
	if tc == nil {
		return true, nil
	}
	raw, err := tc.SyscallConn()
	if err != nil {
		return true, err
	}
	now, err := congestionOf(raw)
	if err != nil || !strings.HasPrefix(now, "bbr") {
		return true, err
	}
	p, ok := PathOf(tc)
	name := autoCongestion(now, p.RoundTrip)
	if !ok || name == "" {
		return false, nil
	}
	return true, setCongestion(raw, name)
}

// autoCongestion is what to use in place of what is in use on a path; empty for that.
func autoCongestion(now string, roundTrip time.Duration) string {
	if strings.HasPrefix(now, "bbr") && roundTrip < longRoundTrip {
		return "cubic"
	}
	return ""
}

func setCongestion(c syscall.RawConn, name string) (err error) {
	cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, name) })
	return errors.Join(cerr, err)
}

func congestionOf(c syscall.RawConn) (name string, err error) {
	cerr := c.Control(func(fd uintptr) { name, err = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION) })
	return name, errors.Join(cerr, err)
}

// sysctl is a setting of the network namespace, for messages.
func sysctl(name string) string {
	b, err := os.ReadFile("/proc/sys/net/ipv4/" + name)
	if err != nil {
		return "what can't be read here"
	}
	return strings.TrimSpace(string(b))
}
