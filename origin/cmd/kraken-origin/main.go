// Command kraken-origin keeps blobs, seeds them, and writes them back to a bucket.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"

	"kraken/origin"
	"kraken/proto/role"
)

func main() {
	role.Main("origin", "keeps blobs, seeds them, writes them back to a bucket", origin.New, audit())
}

// audit is the command that compares the names with where their bytes are.
func audit() role.Job[origin.Config] {
	var opt origin.AuditOptions
	return role.Job[origin.Config]{
		Name:  "audit",
		Short: "say which blobs are neither in their bucket nor owed to it by enough origins",
		Long: `Asks build-index for every member of every repository, and of each whether the repository's bucket has it, verified,
or as many origins as there are replicas owe it to the bucket. A line is written for each of which neither holds:
"missing", or "unknown" where somebody did not answer, the repository, the digest, and why; then a sum. It runs beside
the origins, with the configuration of any of them, and changes nothing.

An object whose digest the bucket does not keep with it is read and hashed, unless --size-only.
Exit code: 0 all is there, 1 members are missing, 2 of some it is not known, or the audit could not be made.`,
		Flags: func(f *flag.FlagSet) {
			f.StringVar(&opt.BuildIndex, "build-index", "", "URL of build-index (required)")
			f.StringVar(&opt.Repository, "repository", "", "audit this repository alone")
			f.BoolVar(&opt.SizeOnly, "size-only", false, "take objects of the right size without reading them")
		},
		Run: func(ctx context.Context, cfg origin.Config, _ []string, out io.Writer) error {
			sum, err := origin.Audit(ctx, cfg, opt, out)
			var found *origin.AuditError
			if err != nil && !errors.As(err, &found) {
				return notMade{err}
			}
			fmt.Fprintf(out, "%d repositories, %d members: %d in a bucket, %d by their size alone, %d owed, %d missing, %d not known\n",
				sum.Repositories, sum.Members, sum.InBucket, sum.BySize, sum.Owed, sum.Missing, sum.Unknown)
			return err
		},
	}
}

// notMade is why an audit came to no end.
type notMade struct{ error }

func (e notMade) Unwrap() error { return e.error }

// ExitCode implements what role.Execute asks.
func (notMade) ExitCode() int { return 2 }
