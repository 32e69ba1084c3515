// Command devcluster runs a whole Kraken cluster on this machine's loopback for development: a stand-in bucket, three
// origins, a tracker, a build-index, a proxy and agents, as separate processes or as containers. State, configuration
// and logs are in one folder; `down` ends exactly what `up` started.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"

	"kraken/deploy/devcluster"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "devcluster:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var o devcluster.Options
	root := &cobra.Command{
		Use:           "devcluster",
		Short:         "Run a Kraken cluster on this machine's loopback",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	f := root.PersistentFlags()
	f.StringVar(&o.Dir, "dir", ".devcluster", "folder for state, configuration and logs")
	f.StringVar(&o.Bin, "bin", "bin", "folder with the kraken binaries (process runtime)")
	f.StringVar(&o.Runtime, "runtime", "process", "how components run: process or docker")

	var layout string
	up := &cobra.Command{
		Use:   "up",
		Short: "Start the cluster and wait until every component is ready",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := readLayout(layout, &o); err != nil {
				return err
			}
			cl, err := devcluster.Plan(o)
			if err != nil {
				return err
			}
			if err := cl.Up(c.Context(), c.OutOrStdout()); err != nil {
				return err
			}
			cl.Hints(c.OutOrStdout())
			return nil
		},
	}
	up.Flags().IntVar(&o.Agents, "agents", 2, "number of agents; the fifth and further ones take free ports")
	up.Flags().BoolVar(&o.MutualTLS, "mutual-tls", false, "TLS everywhere: origins, tracker, build-index and peers take only holders of a certificate, which are made")
	up.Flags().BoolVar(&o.Login, "login", false, "the proxy asks who comes: a user is made, with a password that is printed where to find; with --mutual-tls")
	up.Flags().BoolVar(&o.FreePorts, "free-ports", false, "take free ports instead of those of the design")
	up.Flags().StringVar(&layout, "layout", "", "YAML or JSON file with hosts (ip, namespace) and config (keys over those of the templates), each by role or by component")
	up.Flags().StringVar(&o.Runtime, "runtime", "process", "how components run: process or docker")

	root.AddCommand(up,
		onRunning(&o, "down", "End what up started; state and logs stay for a look", false, func(c *cobra.Command, cl *devcluster.Cluster, _ string) error {
			return cl.Down(c.Context(), c.OutOrStdout())
		}),
		onRunning(&o, "status", "Show each component, whether it is alive and ready", false, func(c *cobra.Command, cl *devcluster.Cluster, _ string) error {
			return cl.Status(c.Context(), c.OutOrStdout())
		}),
		onRunning(&o, "stop", "Stop one component gracefully (SIGTERM, bounded)", true, func(c *cobra.Command, cl *devcluster.Cluster, name string) error {
			return cl.Stop(c.Context(), name)
		}),
		onRunning(&o, "kill", "Kill one component at once (SIGKILL)", true, func(c *cobra.Command, cl *devcluster.Cluster, name string) error {
			return cl.Kill(c.Context(), name)
		}),
		onRunning(&o, "start", "Start one component again and wait until it is ready", true, func(c *cobra.Command, cl *devcluster.Cluster, name string) error {
			return cl.Start(c.Context(), name)
		}),
		onRunning(&o, "wipe", "Remove the state of one stopped component", true, func(c *cobra.Command, cl *devcluster.Cluster, name string) error {
			return cl.Wipe(name)
		}),
	)
	return root
}

// readLayout reads what is too much for flags into o; an empty name is no file.
func readLayout(file string, o *devcluster.Options) error {
	if file == "" {
		return nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var l struct {
		Hosts  map[string]devcluster.Host
		Config map[string]map[string]any
	}
	if err := yaml.UnmarshalWithOptions(b, &l, yaml.Strict()); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	o.Hosts, o.Config = l.Hosts, l.Config
	return nil
}

// onRunning is a command on a cluster that up has started.
func onRunning(o *devcluster.Options, use, short string, named bool, run func(*cobra.Command, *devcluster.Cluster, string) error) *cobra.Command {
	args := cobra.NoArgs
	if named {
		use, args = use+" COMPONENT", cobra.ExactArgs(1)
	}
	return &cobra.Command{Use: use, Short: short, Args: args, RunE: func(c *cobra.Command, a []string) error {
		cl, err := devcluster.Load(*o)
		if errors.Is(err, devcluster.ErrNone) && c.Name() == "down" {
			fmt.Fprintln(c.OutOrStdout(), "nothing to stop:", err)
			return nil
		}
		if err != nil {
			return err
		}
		name := ""
		if named {
			name = a[0]
		}
		return run(c, cl, name)
	}}
}
