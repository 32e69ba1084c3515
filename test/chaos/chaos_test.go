package chaos

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kraken/deploy/devcluster"
)

var (
	seedFlag   = flag.Uint64("seed", 1, "seed of the faults; 0: another one each time")
	faultsFlag = flag.Int("faults", 8, "how many faults happen")
	goalsFlag  = flag.Bool("goals", false, "a missed goal is an error too: a request that failed because of one part, a slow start")
	kindsFlag  = flag.String("kinds", "", "kinds of faults, separated by commas; empty: all")
	rolesFlag  = flag.String("roles", "", "roles that have faults, separated by commas; empty: all")
)

// own says in the environment that this process is in namespaces of its own.
const own = "KRAKEN_CHAOS_OWN_NAMESPACES"

// TestMain runs the tests in a network and a mount namespace of their own where that can be done, so that cut networks
// and full disks are nobody else's.
func TestMain(m *testing.M) {
	if os.Getenv(own) != "" || os.Geteuid() != 0 || !canUnshare() {
		os.Exit(m.Run())
	}
	cmd := exec.Command("unshare", append([]string{"--net", "--mount", "--propagation", "private", os.Args[0]}, os.Args[1:]...)...)
	cmd.Env = append(os.Environ(), own+"=1")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	err := cmd.Run()
	if exit, ok := err.(*exec.ExitError); ok {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// canUnshare reports whether this machine lets us have all that is needed there, and has the commands.
func canUnshare() bool {
	probe := `set -e; ip link set lo up; iptables -w -L INPUT -n >/dev/null; d=$(mktemp -d); trap 'rm -rf "$d"' EXIT; truncate -s 8M "$d/i"
		mkfs.ext4 -q "$d/i"; mkdir "$d/m"; mount -o loop "$d/i" "$d/m"; umount "$d/m"`
	return exec.Command("unshare", "--net", "--mount", "--propagation", "private", "bash", "-c", probe).Run() == nil
}

func TestChaos(t *testing.T) {
	if testing.Short() {
		t.Skip("two minutes")
	}
	alone := os.Getenv(own) != ""
	if err := loopback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !alone {
		t.Log("not root, or no namespaces here: networks are not cut and disks not filled")
	}
	dir := t.TempDir()
	bin := filepath.Join(dir, "bin")
	if err := devcluster.Build(t.Context(), bin); err != nil {
		t.Fatal(err)
	}
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	listed := func(list, s string) bool { return list == "" || contains(strings.Split(list, ","), s) }
	wanted := func(kind, role string) bool { return listed(*kindsFlag, kind) && listed(*rolesFlag, role) }
	state := filepath.Join(dir, "cluster")
	rep, wrong, err := Run(context.Background(), Options{
		Dir: state, Bin: bin, Alone: alone, Seed: seed, Faults: *faultsFlag, Writers: 4, Readers: 3, Wanted: wanted, Log: t.Logf,
	})
	t.Logf("seed %d", seed)
	if rep != nil {
		var b strings.Builder
		if err := rep.table(&b); err != nil {
			t.Error(err)
		}
		t.Logf("\n%s", b.String())
		for _, u := range rep.unmet(10 * time.Second) {
			if t.Log("goal missed: " + u); *goalsFlag {
				t.Fail()
			}
		}
	}
	for _, w := range wrong {
		t.Error(w)
	}
	if err != nil {
		t.Error(err)
	}
	if t.Failed() {
		keep(t, state)
	}
}

// loopback sets up the loopback of a namespace of our own.
func loopback(ctx context.Context) error {
	if os.Getenv(own) == "" {
		return nil
	}
	return run(ctx, "ip", "link", "set", "lo", "up")
}

// contains reports whether s is in list.
func contains(list []string, s string) bool {
	for _, x := range list {
		if strings.TrimSpace(x) == s {
			return true
		}
	}
	return false
}

// keep copies the logs of a failed run to where they outlive the test.
func keep(t *testing.T, state string) {
	to, err := os.MkdirTemp("", "kraken-chaos-logs-")
	if err != nil {
		t.Error(err)
		return
	}
	logs, err := filepath.Glob(filepath.Join(state, "*", "log"))
	if err != nil {
		t.Error(err)
	}
	for _, l := range logs {
		b, err := os.ReadFile(l)
		if err == nil {
			err = os.WriteFile(filepath.Join(to, filepath.Base(filepath.Dir(l))+".log"), b, 0o600)
		}
		if err != nil {
			t.Error(err)
		}
	}
	t.Logf("logs of the components: %s", to)
}
