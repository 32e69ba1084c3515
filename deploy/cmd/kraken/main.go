// Command kraken is for people who run a cluster. The roles are programs of their own, kraken-<role>.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"kraken/deploy/airgap"
	"kraken/deploy/certs"
	"kraken/proto/role"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	code := role.Execute(ctx, command(), os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// command has one command for each thing that can be done; each comes from the package that does it.
func command() *cobra.Command {
	c := &cobra.Command{Use: "kraken", Short: "For people who run a Kraken cluster", Version: role.Version(), SilenceUsage: true, SilenceErrors: true}
	c.CompletionOptions.DisableDefaultCmd = true
	c.AddCommand(certs.Command(), airgap.Command())
	return c
}
