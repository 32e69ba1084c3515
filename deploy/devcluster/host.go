package devcluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// Host is where components run: an address, and the network namespace (ip-netns(8)) that has it. Without a namespace it
// is this program's own.
type Host struct {
	IP        string `json:"ip"`
	Namespace string `json:"namespace,omitempty"`
}

var loopback = Host{IP: "127.0.0.1"}

// Enter calls fn on a thread that is in the host's network namespace; sockets that fn makes stay in it. It needs root
// when there is one.
func (h Host) Enter(fn func() error) error {
	if h.Namespace == "" {
		return fn()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer home.Close()
	there, err := os.Open(filepath.Join("/run/netns", h.Namespace))
	if err != nil {
		return err
	}
	defer there.Close()
	if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter namespace %s: %w", h.Namespace, err)
	}
	err = fn()
	if herr := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); herr != nil {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine instead of serving others
		return errors.Join(err, herr)
	}
	return err
}

// Client returns a client whose connections begin at the host. Close its idle connections.
func (h Host) Client() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
		err = h.Enter(func() error {
			c, err = (&net.Dialer{}).DialContext(ctx, network, addr)
			return err
		})
		return c, err
	}}}
}

// Listen listens on the host's address.
func (h Host) Listen(port int) (l net.Listener, err error) {
	err = h.Enter(func() error {
		l, err = net.Listen("tcp", net.JoinHostPort(h.IP, strconv.Itoa(port)))
		return err
	})
	return l, err
}

// command returns the command line that runs a program at the host.
func (h Host) command(argv ...string) []string {
	if h.Namespace == "" {
		return argv
	}
	return append([]string{"ip", "netns", "exec", h.Namespace}, argv...)
}
