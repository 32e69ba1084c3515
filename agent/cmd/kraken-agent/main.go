// Command kraken-agent runs on every node: a read-only registry on localhost that fetches blobs from the swarm.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/spf13/cobra"
	_ "golang.org/x/crypto/x509roots/fallback" // images carry no CA roots of their own

	"kraken/agent"
	"kraken/proto/config"
	"kraken/proto/transport"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "kraken-agent:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var path string
	var check bool
	c := &cobra.Command{
		Use:           "kraken-agent --config FILE",
		Short:         "Kraken's agent: a registry on every node that pulls from the swarm",
		Args:          cobra.NoArgs,
		Version:       transport.Version(),
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(c *cobra.Command, _ []string) error {
			var cfg agent.Config
			if err := config.Load(path, &cfg); err != nil || check {
				return err
			}
			log, err := transport.NewLogger(os.Stderr, cfg.Log)
			if err != nil {
				return err
			}
			a, err := agent.New(cfg, agent.Deps{Log: log, Registry: transport.NewRegistry("agent")})
			if err != nil {
				return err
			}
			// The collector gets its own memory and threads in its first cycle, which would otherwise fall into the first pull.
			runtime.GC()
			return a.Run(c.Context())
		},
	}
	c.Flags().StringVar(&path, "config", "", "configuration file, see deploy/config/agent.yaml (required)")
	c.Flags().BoolVar(&check, "check", false, "validate the configuration and exit")
	cobra.CheckErr(c.MarkFlagRequired("config"))
	return c
}
