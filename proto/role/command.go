package role

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	_ "golang.org/x/crypto/x509roots/fallback" // images carry no CA roots of their own

	"kraken/proto/config"
)

// Main is the process of one role: it reads the command line and the configuration, opens the role, runs it until
// SIGTERM or SIGINT, and exits with 0, or with 1 and the reason on stderr.
func Main[C any, P settings[C], R Runner](name, short string, open func(C, Deps) (R, error), jobs ...Job[C]) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	code := Execute(ctx, Command[C, P](name, short, open, jobs...), os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// Execute runs a command until it is done, or ctx is, and returns the exit code: that of an error with a method
// ExitCode, 1 for another, else 0.
func Execute(ctx context.Context, c *cobra.Command, args []string, stdout, stderr io.Writer) int {
	c.SetArgs(args)
	c.SetOut(stdout)
	c.SetErr(stderr)
	if err := c.ExecuteContext(ctx); err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", c.Name(), err)
		var coded interface{ ExitCode() int }
		if errors.As(err, &coded) {
			return coded.ExitCode()
		}
		return 1
	}
	return 0
}

// Job is a command of a role's program that does one thing, with the role's configuration, and ends.
type Job[C any] struct {
	Name, Short string
	Below       string   // the command that the job is a command of; empty: the program itself
	Long        string   // for --help
	Args        []string // names of the arguments that it takes
	Flags       func(*flag.FlagSet)
	Run         func(ctx context.Context, cfg C, args []string, out io.Writer) error
}

// command is the job's command line. It opens nothing of the role.
func (j Job[C]) command(role string) *cobra.Command {
	var path string
	c := &cobra.Command{
		Use: strings.Join(append([]string{j.Name}, j.Args...), " ") + " --config FILE", Short: j.Short, Long: j.Long,
		Args: cobra.ExactArgs(len(j.Args)), SilenceUsage: true, SilenceErrors: true,
		RunE: func(c *cobra.Command, args []string) error {
			if path == "" {
				return fmt.Errorf("--config FILE is needed: that of kraken-%s", role)
			}
			var cfg C
			if err := config.Load(path, &cfg); err != nil {
				return err
			}
			return j.Run(c.Context(), cfg, args, c.OutOrStdout())
		},
	}
	c.Flags().StringVar(&path, "config", "", "configuration file of kraken-"+role+" (required)")
	flags := flag.NewFlagSet(j.Name, flag.ContinueOnError)
	if j.Flags != nil {
		j.Flags(flags)
	}
	c.Flags().AddGoFlagSet(flags)
	return c
}

// Command is the command line of kraken-<name>.
func Command[C any, P settings[C], R Runner](name, short string, open func(C, Deps) (R, error), jobs ...Job[C]) *cobra.Command {
	var path string
	var check bool
	c := &cobra.Command{
		Use:           "kraken-" + name + " --config FILE",
		Short:         "Kraken's " + name + ": " + short,
		Args:          cobra.NoArgs,
		Version:       Version(),
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(c *cobra.Command, _ []string) error {
			if path == "" {
				return fmt.Errorf("--config FILE is needed: deploy/config/%s.yaml is a sample that explains every key; --help lists the flags", name)
			}
			var cfg C
			if err := config.Load(path, &cfg); err != nil {
				return err
			}
			if check {
				_, err := fmt.Fprintln(c.OutOrStdout(), "ok")
				return err
			}
			log, err := NewLogger(c.ErrOrStderr(), P(&cfg).Shared().Log)
			if err != nil {
				return err
			}
			r, err := open(cfg, Deps{Log: log, Registry: NewRegistry(name), Die: func(why error, last func()) { die(c.ErrOrStderr(), why, last) }})
			if err != nil {
				return err
			}
			// The collector gets its own memory and threads in its first cycle, which would otherwise fall into the
			// first request.
			runtime.GC()
			return r.Run(c.Context())
		},
	}
	groups := map[string]*cobra.Command{}
	for _, j := range jobs {
		under := c
		if j.Below != "" {
			if groups[j.Below] == nil {
				groups[j.Below] = &cobra.Command{Use: j.Below}
				c.AddCommand(groups[j.Below])
			}
			under = groups[j.Below]
			under.Short += map[bool]string{true: "; "}[under.Short != ""] + j.Short
		}
		under.AddCommand(j.command(name))
	}
	c.CompletionOptions.DisableDefaultCmd = true
	c.Flags().StringVar(&path, "config", "", "configuration file, see deploy/config/"+name+".yaml (required)")
	c.Flags().BoolVar(&check, "check", false, "say ok, or all that is wrong with the configuration, and exit")
	return c
}
