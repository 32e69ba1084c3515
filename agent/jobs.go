package agent

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"kraken/agent/mirror"
	"kraken/proto/cluster"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// Jobs are the commands of kraken-agent that set up the runtimes of its node.
func Jobs() []role.Job[Config] {
	in, un, doc := &mirrorFlags{}, &mirrorFlags{}, &mirrorFlags{}
	var platform, probe string
	return []role.Job[Config]{
		{
			Name: "install", Below: "mirror", Short: "set the node's runtimes up to ask the agent first",
			Long: "Writes the configuration of the runtimes that are on the node, or of those named, so that they ask the agent before any registry, and go on to\n" +
				"that registry themselves when the agent is away or does not mirror it. What was there is kept for uninstall. It can be repeated.",
			Flags: func(f *flag.FlagSet) {
				in.add(f)
				f.StringVar(&in.registries, "registries", "", "what to ask the agent for, as docker.io,registry.corp:5000; default all, or the well-known where a runtime knows no all")
				f.StringVar(&in.runtimes, "runtimes", "", "some of "+strings.Join(mirror.Runtimes, ",")+"; default those found")
				f.BoolVar(&in.noFallback, "no-fallback", false, "nothing goes around the agent: while it is away nothing can be pulled")
				f.StringVar(&platform, "for", "", "print what to put where, instead: "+strings.Join(mirror.Platforms, ", "))
			},
			Run: func(_ context.Context, cfg Config, _ []string, out io.Writer) error {
				s, err := in.settings(cfg)
				if err != nil {
					return err
				}
				if platform != "" {
					return mirror.Explain(platform, s, out)
				}
				return mirror.Install(s, out)
			},
		},
		{
			Name: "uninstall", Below: "mirror", Short: "restore what was there before",
			Flags: un.add,
			Run: func(_ context.Context, cfg Config, _ []string, out io.Writer) error {
				s, err := un.settings(cfg)
				if err != nil {
					return err
				}
				return mirror.Uninstall(s, out)
			},
		},
		{
			Name: "doctor", Below: "mirror", Short: "find out why a runtime does not ask the agent",
			Long: "Looks at the runtimes' configuration and at the agent, and pulls an image through it. The exit code is 1 when something is wrong.",
			Flags: func(f *flag.FlagSet) {
				doc.add(f)
				f.BoolVar(&doc.noFallback, "no-fallback", false, "that there is no fall-back is meant")
				f.StringVar(&probe, "probe", mirror.DefaultProbe, "the image to pull through the agent; empty for none")
			},
			Run: func(ctx context.Context, cfg Config, _ []string, out io.Writer) error {
				return doctor(ctx, cfg, doc, probe, out)
			},
		},
	}
}

// mirrorFlags are the flags of these commands.
type mirrorFlags struct {
	root, registries, runtimes, containerd string
	noFallback, dryRun                     bool
}

func (m *mirrorFlags) add(f *flag.FlagSet) {
	f.StringVar(&m.root, "root", "", "the folder in which the node's file system is, as /host in a pod")
	f.StringVar(&m.containerd, "containerd-version", "", "take this for containerd's version, as 2.2; default: it is asked")
	f.BoolVar(&m.dryRun, "dry-run", false, "say what would be written, and write nothing")
}

// settings are those for an agent with a configuration.
func (m *mirrorFlags) settings(cfg Config) (s mirror.Settings, err error) {
	s = mirror.Settings{
		Root: m.root, Own: cfg.Names, Registries: list(m.registries), Runtimes: list(m.runtimes), NoFallback: m.noFallback, ContainerdVersion: m.containerd,
		DryRun: m.dryRun,
	}
	if s.Agent, err = mirror.URLOf(cfg.Server.Listen, cfg.Server.TLS.Cert != ""); err != nil {
		return s, err
	}
	if cfg.DockerHub.Listen != "" {
		s.DockerHub, err = mirror.URLOf(cfg.DockerHub.Listen, cfg.DockerHub.TLS.Cert != "")
	}
	return s, err
}

func list(text string) []string {
	return slices.DeleteFunc(strings.Split(text, ","), func(s string) bool { return s == "" })
}

// doctor prints all that is wrong, and pulls the probe.
func doctor(ctx context.Context, cfg Config, m *mirrorFlags, probe string, out io.Writer) error {
	s, err := m.settings(cfg)
	if err != nil {
		return err
	}
	found, err := mirror.Doctor(ctx, s)
	if err != nil {
		return err
	}
	if f, ok := secretsInReach(ctx, cfg); ok {
		found = append(found, f)
	}
	wrong := 0
	for _, f := range found {
		fmt.Fprintln(out, f)
		if !f.Harmless {
			wrong++
		}
	}
	if wrong == 0 {
		fmt.Fprintln(out, "ok      the runtimes' configuration, and the agent")
	}
	if probe != "" {
		if err := mirror.Probe(ctx, s, probe, out); err != nil {
			fmt.Fprintf(out, "PROBLEM %v\n", err)
			wrong++
		}
	}
	if wrong > 0 {
		return fmt.Errorf("%d problems", wrong)
	}
	return nil
}

// secretsInReach warns when runtimes are asked for their pull secrets at a port that any user of the node may bind
// while the agent is away.
func secretsInReach(ctx context.Context, cfg Config) (f mirror.Finding, found bool) {
	_, port, err := net.SplitHostPort(cfg.Server.Listen)
	n, perr := strconv.Atoi(port)
	if err != nil || perr != nil || n < 1024 || cfg.Server.TLS.Cert != "" {
		return f, false
	}
	hc, err := transport.NewClient(cfg.Client, nil)
	if err != nil {
		return f, false // --check says so
	}
	defer hc.CloseIdleConnections()
	index, err := cluster.NewIndexClient(cfg.BuildIndex.URL, hc)
	if err != nil {
		return f, false
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	u, err := index.Upstreams(ctx)
	if err != nil {
		return mirror.Finding{Kind: mirror.Unknown, Where: cfg.BuildIndex.URL, Problem: "what is mirrored is not known: " + err.Error(), Remedy: "is build-index reachable from this node?", Harmless: true}, true
	}
	for _, up := range u.Upstreams {
		if slices.ContainsFunc(up.Modes, func(m cluster.RepositoryMode) bool { return m.Mode == cluster.ModeCaller }) {
			return mirror.Finding{
				Kind: mirror.SecretsInReach, Where: cfg.Server.Listen, Problem: up.Registry + " has repositories of mode caller, for which runtimes send their pull secrets here: any user of the node may bind this port while the agent is away",
				Remedy: "server.tls with a certificate that runtimes trust, or a port below 1024",
			}, true
		}
	}
	return f, false
}
