// Command kraken-build-index keeps names: manifests, tags, and which repository holds which blob.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	_ "golang.org/x/crypto/x509roots/fallback" // images carry no CA roots of their own

	"kraken/buildindex"
	"kraken/proto/config"
	"kraken/proto/transport"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "kraken-build-index:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var path string
	var check bool
	c := &cobra.Command{
		Use:           "kraken-build-index --config FILE",
		Short:         "Kraken's build-index: manifests, tags, and which repository holds which blob",
		Args:          cobra.NoArgs,
		Version:       transport.Version(),
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(c *cobra.Command, _ []string) error {
			var cfg buildindex.Config
			if err := config.Load(path, &cfg); err != nil || check {
				return err
			}
			log, err := transport.NewLogger(os.Stderr, cfg.Log)
			if err != nil {
				return err
			}
			x, err := buildindex.New(cfg, buildindex.Deps{Log: log, Registry: transport.NewRegistry("build-index")})
			if err != nil {
				return err
			}
			return x.Run(c.Context())
		},
	}
	c.Flags().StringVar(&path, "config", "", "configuration file, see deploy/config/build-index.yaml (required)")
	c.Flags().BoolVar(&check, "check", false, "validate the configuration and exit")
	cobra.CheckErr(c.MarkFlagRequired("config"))
	return c
}
