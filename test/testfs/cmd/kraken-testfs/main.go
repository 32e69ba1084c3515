// Command kraken-testfs is the stand-in bucket of the dev cluster: S3 over a directory.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"kraken/proto/role"
	"kraken/test/testfs"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	var cfg testfs.Config
	c := &cobra.Command{
		Use:           "kraken-testfs --listen ADDR --dir DIR",
		Short:         "A stand-in bucket: S3 over a directory, for development and tests",
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if cfg.Log, err = role.NewLogger(os.Stderr, role.LogConfig{}); err != nil {
				return err
			}
			s, err := testfs.New(cfg)
			if err != nil {
				return err
			}
			return s.Run(c.Context())
		},
	}
	c.Flags().StringVar(&cfg.Listen, "listen", "127.0.0.1:16050", "host:port to listen at")
	c.Flags().StringVar(&cfg.Dir, "dir", "", "folder for buckets and objects (required)")
	cobra.CheckErr(c.MarkFlagRequired("dir"))
	if err := c.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "kraken-testfs:", err)
		os.Exit(1)
	}
}
