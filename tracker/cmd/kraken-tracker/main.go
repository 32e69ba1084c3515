// Command kraken-tracker knows which node has which blob, and shows it.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	_ "golang.org/x/crypto/x509roots/fallback" // images carry no CA roots of their own

	"kraken/proto/config"
	"kraken/proto/transport"
	"kraken/tracker"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "kraken-tracker:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var path string
	var check bool
	c := &cobra.Command{
		Use:           "kraken-tracker --config FILE",
		Short:         "Kraken's tracker: who has what, in one round trip",
		Args:          cobra.NoArgs,
		Version:       transport.Version(),
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(c *cobra.Command, _ []string) error {
			var cfg tracker.Config
			if err := config.Load(path, &cfg); err != nil || check {
				return err
			}
			log, err := transport.NewLogger(os.Stderr, cfg.Log)
			if err != nil {
				return err
			}
			t, err := tracker.New(cfg, tracker.Deps{Log: log, Registry: transport.NewRegistry("tracker")})
			if err != nil {
				return err
			}
			return t.Run(c.Context())
		},
	}
	c.Flags().StringVar(&path, "config", "", "configuration file, see deploy/config/tracker.yaml (required)")
	c.Flags().BoolVar(&check, "check", false, "validate the configuration and exit")
	cobra.CheckErr(c.MarkFlagRequired("config"))
	return c
}
