package transport

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// PortOwner names the process that listens on addr's port, empty when that can't be known (proc(5)).
func PortOwner(addr string) string {
	_, p, err := net.SplitHostPort(addr)
	if err != nil {
		return ""
	}
	port, err := strconv.ParseUint(p, 10, 16)
	if err != nil || port == 0 {
		return ""
	}
	inodes := map[string]bool{}
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		listeners(table, port, inodes)
	}
	fds, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return ""
	}
	for _, fd := range fds {
		target, err := os.Readlink(fd)
		if err != nil || !strings.HasPrefix(target, "socket:[") || !inodes[strings.Trim(target, "socket:[]")] {
			continue
		}
		pid := strings.Split(fd, "/")[2]
		name, err := os.ReadFile("/proc/" + pid + "/comm")
		if err != nil {
			continue
		}
		return fmt.Sprintf("process %s (%s)", pid, strings.TrimSpace(string(name)))
	}
	return ""
}

// listeners adds the inodes of sockets that listen on port.
func listeners(table string, port uint64, inodes map[string]bool) {
	f, err := os.Open(table)
	if err != nil {
		return
	}
	defer f.Close()
	const stateListen = "0A"
	for sc := bufio.NewScanner(f); sc.Scan(); {
		c := strings.Fields(sc.Text())
		if len(c) < 10 || c[3] != stateListen {
			continue
		}
		_, hex, _ := strings.Cut(c[1], ":")
		if n, err := strconv.ParseUint(hex, 16, 16); err == nil && n == port {
			inodes[c[9]] = true
		}
	}
}
