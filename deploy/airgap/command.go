package airgap

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"kraken/origin/upstream"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// options are the flags.
type options struct {
	to, as, list, digests, dockerConfig, ca, user, passwordFile string
	plainHTTP                                                   bool
}

// Command is `kraken import`.
func Command() *cobra.Command {
	var o options
	c := &cobra.Command{
		Use:   "import --to URL [FOLDER|ARCHIVE]...",
		Short: "push images of other registries to a cluster that has no way to them, under the names that they have there",
		Long: `Takes OCI layouts (a folder, or a tar archive of one), archives of docker save, and lists of images that are read from
their registries, and pushes them to the proxy: docker.io/library/nginx:1.27 is then what every node pulls by that name.
Build-index' configuration must mark the registry: upstreams: {registries: [{registry: docker.io, import: true, offline: true}]}.
What is there already is not pushed again, so that what was broken off is just begun anew.`,
		RunE: func(c *cobra.Command, args []string) error { return o.run(c.Context(), args, c) },
	}
	f := c.Flags()
	f.StringVar(&o.to, "to", "", "URL of a proxy, as https://registry.example (required)")
	f.StringVar(&o.as, "as", "", "the image's name, where a layout or an archive of one image does not say it, or says another: docker.io/library/nginx:1.27")
	f.StringVar(&o.list, "list", "", "file of images, one registry/repository:tag a line, which are read from their registries")
	f.StringVar(&o.digests, "digests", "", "file of these images' digests, IMAGE DIGEST a line: nothing else is taken")
	f.StringVar(&o.dockerConfig, "docker-config", "", "config.json with credentials for the registries of the list")
	f.BoolVar(&o.plainHTTP, "plain-http", false, "the registries of the list may be asked without TLS")
	f.StringVar(&o.ca, "ca", "", "PEM file of roots that the proxy's certificate may be of, beside the system's")
	f.StringVar(&o.user, "user", "", "login at the proxy")
	f.StringVar(&o.passwordFile, "password-file", "", "file with its password")
	return c
}

// run carries all images, and goes on after one that fails.
func (o options) run(ctx context.Context, paths []string, c *cobra.Command) error {
	if o.to == "" || len(paths) == 0 && o.list == "" {
		return errors.New("--to URL is needed, and a folder, an archive or --list FILE")
	}
	to, err := o.proxy()
	if err != nil {
		return err
	}
	var images []image
	for _, p := range paths {
		found, done, err := openFiles(p, o.as)
		if err != nil {
			return err
		}
		defer done()
		images = append(images, found...)
	}
	if o.list != "" {
		set, found, err := o.fromRegistries(ctx)
		if err != nil {
			return err
		}
		defer set.Close()
		images = append(images, found...)
	}
	p := pusher{to: to, atOnce: 3, progress: &progress{out: c.OutOrStdout(), total: len(images)}}
	var errs []error
	for _, i := range images {
		if err := p.push(ctx, i); err != nil {
			errs = append(errs, err)
			fmt.Fprintf(c.ErrOrStderr(), "failed: %v\n", err)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("%d of %d images were not carried", len(errs), len(images))
	}
	return nil
}

// fromRegistries returns the images of the list. The caller closes the set.
func (o options) fromRegistries(ctx context.Context) (*upstream.Set, []image, error) {
	list, err := readList(o.list)
	if err != nil {
		return nil, nil, err
	}
	everything := []cluster.RepositoryMode{{Repository: "**", Mode: cluster.ModeNode}} // that the credentials may read
	cfg := upstream.Config{Registries: []upstream.RegistryConfig{{Registry: "*", Modes: everything}}, AllowAddresses: []string{"0.0.0.0/0", "::/0"}}
	cfg.Registries[0].PlainHTTP, cfg.Registries[0].Credentials.DockerConfig = o.plainHTTP, o.dockerConfig
	set, err := upstream.Open(cfg, upstream.Options{})
	if err != nil {
		return nil, nil, err
	}
	images, err := o.chosen(ctx, set, list)
	if err != nil {
		set.Close()
		return nil, nil, err
	}
	return set, images, nil
}

func (o options) chosen(ctx context.Context, set *upstream.Set, list []string) ([]image, error) {
	if o.digests == "" {
		return listed(ctx, set, list, nil)
	}
	digests, err := readDigests(o.digests)
	if err != nil {
		return nil, err
	}
	return listed(ctx, set, list, digests)
}

// proxy is a client of the proxy, with its login.
func (o options) proxy() (*registry.Client, error) {
	hc, err := transport.NewClient(transport.ClientConfig{CA: o.ca}, nil)
	if err != nil {
		return nil, err
	}
	if o.user != "" {
		password, err := os.ReadFile(o.passwordFile)
		if err != nil {
			return nil, fmt.Errorf("--password-file: %w", err)
		}
		to, err := url.Parse(o.to)
		if err != nil {
			return nil, fmt.Errorf("--to: %w", err)
		}
		hc.Transport = login{hc.Transport, to.Host, o.user, strings.TrimSpace(string(password))}
	}
	return registry.NewClient(o.to, hc)
}

// login sends a name and a password with each request to one host.
type login struct {
	next                 http.RoundTripper
	host, user, password string
}

// RoundTrip implements http.RoundTripper.
func (l login) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Host != l.host {
		return l.next.RoundTrip(r)
	}
	r = r.Clone(r.Context())
	r.SetBasicAuth(l.user, l.password)
	return l.next.RoundTrip(r)
}
