// Command kraken-origin keeps blobs, seeds them, and writes them back to a bucket.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	_ "golang.org/x/crypto/x509roots/fallback" // images carry no CA roots of their own

	"kraken/origin"
	"kraken/proto/config"
	"kraken/proto/transport"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "kraken-origin:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var path string
	var check bool
	c := &cobra.Command{
		Use:           "kraken-origin --config FILE",
		Short:         "Kraken's origin: keeps blobs, seeds them, writes them back to a bucket",
		Args:          cobra.NoArgs,
		Version:       transport.Version(),
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(c *cobra.Command, _ []string) error {
			var cfg origin.Config
			if err := config.Load(path, &cfg); err != nil || check {
				return err
			}
			log, err := transport.NewLogger(os.Stderr, cfg.Log)
			if err != nil {
				return err
			}
			o, err := origin.New(cfg, origin.Deps{Log: log, Registry: transport.NewRegistry("origin")})
			if err != nil {
				return err
			}
			return o.Run(c.Context())
		},
	}
	c.Flags().StringVar(&path, "config", "", "configuration file, see deploy/config/origin.yaml (required)")
	c.Flags().BoolVar(&check, "check", false, "validate the configuration and exit")
	cobra.CheckErr(c.MarkFlagRequired("config"))
	return c
}
