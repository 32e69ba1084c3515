// Command kraken-proxy is the front door of a cluster: a full OCI registry that keeps nothing itself.
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
	"kraken/proxy"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "kraken-proxy:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var path string
	var check bool
	c := &cobra.Command{
		Use:           "kraken-proxy --config FILE",
		Short:         "Kraken's proxy: the registry that people and CI push to",
		Args:          cobra.NoArgs,
		Version:       transport.Version(),
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(c *cobra.Command, _ []string) error {
			var cfg proxy.Config
			if err := config.Load(path, &cfg); err != nil || check {
				return err
			}
			log, err := transport.NewLogger(os.Stderr, cfg.Log)
			if err != nil {
				return err
			}
			p, err := proxy.New(cfg, proxy.Deps{Log: log, Registry: transport.NewRegistry("proxy")})
			if err != nil {
				return err
			}
			return p.Run(c.Context())
		},
	}
	c.Flags().StringVar(&path, "config", "", "configuration file, see deploy/config/proxy.yaml (required)")
	c.Flags().BoolVar(&check, "check", false, "validate the configuration and exit")
	cobra.CheckErr(c.MarkFlagRequired("config"))
	return c
}
