package proxy

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"text/tabwriter"
	"time"

	"kraken/proto/access"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/role"
	"kraken/proto/transport"
	"kraken/proxy/login"
)

// Jobs are the commands of kraken-proxy beside the proxy itself.
func Jobs() []role.Job[Config] {
	return []role.Job[Config]{checkAccess(), robotAdd(), robotList(), robotRevoke()}
}

// denied is a decision against the caller; the command ends with 3.
type denied struct{ why string }

func (d denied) Error() string { return "denied: " + d.why }

// ExitCode tells a script a denial from a mistake.
func (denied) ExitCode() int { return 3 }

func checkAccess() role.Job[Config] {
	var groups string
	return role.Job[Config]{
		Name: "check-access", Args: []string{"USER", "REPOSITORY", "ACTION"}, Short: "say whether the rules let somebody do something, and why",
		Long: `Say whether the rules of access.rules let USER do ACTION (pull, push, delete, overwrite) in REPOSITORY, and which
rule decides. USER is spelled as in rules: a user, robot+<name>, <issuer>:<subject>, cert:<name>, node:<id>, or
anonymous. Ends with 0 when it is allowed, with 3 when it is denied.`,
		Flags: func(f *flag.FlagSet) {
			f.StringVar(&groups, "groups", "", "groups that an issuer or a certificate says of USER, between commas")
		},
		Run: func(_ context.Context, cfg Config, args []string, out io.Writer) error {
			if !cfg.Access.Enabled() {
				_, err := fmt.Fprintln(out, "allowed: no access.rules are configured, so everybody may do everything")
				return err
			}
			f, err := access.OpenFile(cfg.Access.Rules, slog.New(slog.DiscardHandler), access.ParsePolicy)
			if err != nil {
				return err
			}
			c := access.Caller{Subject: args[0]}
			if args[0] == access.Anonymous {
				c.Subject = ""
			}
			if groups != "" {
				c.Groups = strings.Split(groups, ",")
			}
			if err := registry.CheckName(args[1]); err != nil {
				return err
			}
			if !access.IsAction(args[2]) {
				return fmt.Errorf("%q is no action: want pull, push, delete or overwrite", args[2])
			}
			d := f.Get().Decide(c, args[1], registry.Action(args[2]))
			if !d.Allowed {
				return denied{d.Why}
			}
			_, err = fmt.Fprintln(out, "allowed: "+d.Why)
			return err
		},
	}
}

// indexOf returns a client of the proxy's build-index.
func indexOf(cfg Config) (*cluster.IndexClient, error) {
	hc, err := transport.NewClient(cfg.Client, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	return cluster.NewIndexClient(cfg.BuildIndex.URL, hc)
}

// jobTimeout bounds what a command waits for build-index.
const jobTimeout = 30 * time.Second

func robotAdd() role.Job[Config] {
	var life time.Duration
	var note string
	return role.Job[Config]{
		Below: "robot", Name: "add", Args: []string{"NAME"}, Short: "make a key for a program, and print it",
		Long: `Make a key for a program, which logs in as robot+NAME with the key as its password. The key is printed once; build-index
keeps its hash. A robot of this name gets the new key, and the old one ends within seconds.`,
		Flags: func(f *flag.FlagSet) {
			f.DurationVar(&life, "expires", 90*24*time.Hour, "after this time the key is not taken any more")
			f.StringVar(&note, "note", "", "what the robot is for")
		},
		Run: func(ctx context.Context, cfg Config, args []string, out io.Writer) error {
			if life <= 0 {
				return fmt.Errorf("--expires %s: want a time to come", life)
			}
			if !cluster.RobotName.MatchString(args[0]) {
				return fmt.Errorf("%q is no name of a robot: want lower case letters, digits, dots, dashes, without %s", args[0], access.RobotPrefix)
			}
			ctx, cancel := context.WithTimeout(ctx, jobTimeout)
			defer cancel()
			index, err := indexOf(cfg)
			if err != nil {
				return err
			}
			robot, key := login.NewRobot(args[0], note, time.Now(), life)
			if err := index.PutRobot(ctx, robot); err != nil {
				return fmt.Errorf("make robot %s: %w", args[0], err)
			}
			_, err = fmt.Fprintf(out, "user:     %s%s\npassword: %s\nexpires:  %s\n", access.RobotPrefix, robot.Name, key, robot.Expires.Format(time.RFC3339))
			return err
		},
	}
}

func robotList() role.Job[Config] {
	return role.Job[Config]{
		Below: "robot", Name: "list", Short: "list the robots",
		Run: func(ctx context.Context, cfg Config, _ []string, out io.Writer) error {
			ctx, cancel := context.WithTimeout(ctx, jobTimeout)
			defer cancel()
			index, err := indexOf(cfg)
			if err != nil {
				return err
			}
			s, err := index.Access(ctx, cluster.AccessState{})
			if err != nil {
				return fmt.Errorf("list the robots: %w", err)
			}
			w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "USER\tCREATED\tEXPIRES\tNOTE")
			for _, r := range s.Robots {
				fmt.Fprintf(w, "%s%s\t%s\t%s\t%s\n", access.RobotPrefix, r.Name, r.Created.Format(time.RFC3339), r.Expires.Format(time.RFC3339), r.Note)
			}
			return w.Flush()
		},
	}
}

func robotRevoke() role.Job[Config] {
	return role.Job[Config]{
		Below: "robot", Name: "revoke", Args: []string{"NAME"}, Short: "end a robot's key",
		Long: "End a robot's key: proxies refuse it, and tokens that were given for it, within seconds.",
		Run: func(ctx context.Context, cfg Config, args []string, out io.Writer) error {
			ctx, cancel := context.WithTimeout(ctx, jobTimeout)
			defer cancel()
			index, err := indexOf(cfg)
			if err != nil {
				return err
			}
			name := strings.TrimPrefix(args[0], access.RobotPrefix)
			err = index.DeleteRobot(ctx, name)
			if errors.Is(err, registry.ErrNameUnknown) {
				return fmt.Errorf("there is no robot %s", name)
			}
			if err != nil {
				return fmt.Errorf("revoke robot %s: %w", name, err)
			}
			_, err = fmt.Fprintf(out, "%s%s is revoked\n", access.RobotPrefix, name)
			return err
		},
	}
}
