package certs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kraken/proto/transport"
)

// Command is `kraken certs`.
func Command() *cobra.Command {
	c := &cobra.Command{
		Use:   "certs",
		Short: "a small certificate authority for clusters that have none, and what is wrong with certificates",
		Long: `The authority is a folder (--dir): ca.pem is what all nodes trust, ca.key signs and leaves the folder never, and
<role>/<id>.pem and .key are what was issued. Hand to each node its own two files and ca.pem, by whatever copies files
there; all are read again when they change. Who has an authority already (cert-manager, step) needs only check.`,
	}
	dir := c.PersistentFlags().String("dir", "certs", "folder of the authority")
	c.AddCommand(initCommand(dir), issueCommand(dir), renewCommand(dir), authorityCommand(dir), checkCommand(dir))
	return c
}

func initCommand(dir *string) *cobra.Command {
	var cluster string
	var days int
	c := &cobra.Command{
		Use: "init --cluster NAME", Short: "make an authority", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if _, err := Init(*dir, cluster, dayLife(days)); err != nil {
				return err
			}
			_, err := fmt.Fprintf(c.OutOrStdout(), "%s\n", filepath.Join(*dir, AuthorityFile))
			return err
		},
	}
	c.Flags().StringVar(&cluster, "cluster", "", "the cluster's name, which all its certificates have (required)")
	c.Flags().IntVar(&days, "days", int(AuthorityLife/(24*time.Hour)), "how long it is valid")
	_ = c.MarkFlagRequired("cluster") // fails only for a flag that is not there
	return c
}

func dayLife(days int) time.Duration { return time.Duration(days) * 24 * time.Hour }

func issueCommand(dir *string) *cobra.Command {
	var r Request
	var days int
	c := &cobra.Command{
		Use: "issue --role ROLE --id ID [--host NAME|ADDRESS]…", Short: "make a key and a certificate", Args: cobra.NoArgs,
		Long: `Roles are ` + roleNames() + `. An operator is a person, who may use admin listeners; a monitor reads health and
metrics. The id of an origin is its configured one, that of an agent its node's name.`,
		RunE: func(c *cobra.Command, _ []string) error {
			a, err := Open(*dir)
			if err != nil {
				return err
			}
			r.Life = dayLife(days)
			i, err := a.Issue(r)
			if err != nil {
				return err
			}
			return printIssued(c.OutOrStdout(), i)
		},
	}
	f := c.Flags()
	f.StringVar((*string)(&r.Role), "role", "", "what its holder is in the cluster (required)")
	f.StringVar(&r.ID, "id", "", "the holder's name, one of each role (required)")
	f.StringSliceVar(&r.Hosts, "host", nil, "DNS name or address that others reach it at; may be given often")
	f.IntVar(&days, "days", int(CertificateLife/(24*time.Hour)), "how long it is valid")
	_ = errors.Join(c.MarkFlagRequired("role"), c.MarkFlagRequired("id"))
	return c
}

func printIssued(w io.Writer, i Issued) error {
	_, err := fmt.Fprintf(w, "%s %s until %s\n", i.File, i.KeyFile, i.Cert.NotAfter.UTC().Format(time.DateOnly))
	return err
}

func renewCommand(dir *string) *cobra.Command {
	var within time.Duration
	var all bool
	c := &cobra.Command{
		Use: "renew", Short: "make new keys and certificates in place of those that end soon", Args: cobra.NoArgs,
		Long: `A certificate is renewed when a third of its life is left, with the same names and for the same time as before. Nodes
read the files again when they change, so this can be a daily job that copies the folder's files out afterwards.`,
		RunE: func(c *cobra.Command, _ []string) error {
			a, err := Open(*dir)
			if err != nil {
				return err
			}
			renewed, err := a.Renew(within, all)
			for _, i := range renewed {
				err = errors.Join(err, printIssued(c.OutOrStdout(), i))
			}
			return err
		},
	}
	c.Flags().DurationVar(&within, "within", 0, "renew those that end within this time, instead of a third of their lives")
	c.Flags().BoolVar(&all, "all", false, "renew every one")
	return c
}

func authorityCommand(dir *string) *cobra.Command {
	return &cobra.Command{
		Use: "authority next|switch|drop", Short: "put another authority in the place of this one, in three steps",
		Long: `next makes another authority, and ca.pem has both: hand it to all nodes. switch signs with the next one: then
renew --all, and hand out all certificates. drop takes the old one out of ca.pem: hand it to all nodes. No request fails
on the way.`,
		Args: cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs), ValidArgs: []string{"next", "switch", "drop"},
		RunE: func(_ *cobra.Command, args []string) error {
			a, err := Open(*dir)
			if err != nil {
				return err
			}
			switch args[0] {
			case "next":
				return a.Next(AuthorityLife)
			case "switch":
				return a.Switch()
			}
			return a.Drop()
		},
	}
}

func checkCommand(dir *string) *cobra.Command {
	var want Want
	c := &cobra.Command{
		Use: "check [FILE|FOLDER]…", Short: "say what is wrong with certificates", SilenceUsage: true,
		Long: `Of each certificate, and all *.pem and *.crt below a folder: time, identity, usage, authority, and its key, where a file of
the same name with .key is beside it. Without an argument it is the authority's folder. Exit code: 0 all is well, 1 not.`,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				args = []string{*dir}
				if ca := filepath.Join(*dir, AuthorityFile); want.CA == "" && exists(ca) {
					want.CA = ca
				}
			}
			return checkAll(c.OutOrStdout(), args, want)
		},
	}
	f := c.Flags()
	f.StringVar(&want.CA, "ca", "", "file of the authorities that the cluster trusts; default ca.pem of --dir, without an argument")
	f.StringVar(&want.Cluster, "cluster", "", "the cluster that certificates must be of")
	f.StringVar((*string)(&want.Role), "role", "", "the role that certificates must name")
	f.StringVar(&want.Host, "host", "", "a name or address that clients reach the holder at")
	f.StringVar(&want.Key, "key", "", "file of the key, default the certificate's name with .key")
	f.DurationVar(&want.Within, "within", transport.CertificateWarning, "say of a certificate that it ends within this time")
	return c
}

func checkAll(out io.Writer, args []string, want Want) error {
	var files []string
	for _, a := range args {
		err := filepath.WalkDir(a, func(path string, d fs.DirEntry, err error) error {
			if ext := filepath.Ext(path); err == nil && !d.IsDir() && (path == a || ext == ".pem" || ext == ".crt") {
				files = append(files, path)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	if len(files) == 0 {
		return fmt.Errorf("%s: no certificate is there", strings.Join(args, ", "))
	}
	var result error
	for _, f := range files {
		faults, says, err := Check(f, want, time.Now())
		if err != nil {
			faults = append(faults, err.Error())
		}
		if len(faults) == 0 {
			fmt.Fprintf(out, "ok    %s: %s\n", f, says)
			continue
		}
		result = errFaults
		fmt.Fprintf(out, "WRONG %s: %s\n", f, says)
		for _, text := range faults {
			fmt.Fprintf(out, "      %s\n", text)
		}
	}
	return result
}
