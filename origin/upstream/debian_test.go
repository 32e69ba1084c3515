package upstream

import (
	"errors"
	"testing"

	"kraken/proto/config"
	"kraken/proto/registry"
	script "kraken/test/upstream"
)

// Debian's registry, with htpasswd and TLS, with tokens, and open, is read as any upstream is.
func TestDebianRegistry(t *testing.T) {
	for name, o := range map[string]script.DebianOptions{
		"htpasswd": {User: "u", Password: "p"}, "token": {Token: true, User: "u", Password: "p"}, "open": {Open: true, NoTLS: true},
	} {
		t.Run(name, func(t *testing.T) {
			d := script.NewDebian(t, o)
			img := d.PutImage(t, "team/app", "v1", []byte("layer"), script.Random(1, 100_000))
			c := RegistryConfig{Registry: d.Host, Access: Access{CA: d.CAFile, PlainHTTP: o.NoTLS}}
			if !o.Open {
				c.Modes, c.Credentials = everything, Credentials{Username: "u", Password: config.NewSecret("p")}
			}
			r, remote := only(t, c, "team/app")
			for range 2 {
				if err := pull(t, r, remote, img); err != nil {
					t.Fatal(err)
				}
			}
			if n := d.Tokens(); o.Token && n != 1 {
				t.Errorf("%d tokens", n)
			}
			if _, err := r.Head(t.Context(), remote, tag("v9")); !errors.Is(err, registry.ErrManifestUnknown) {
				t.Error(err)
			}
			if _, err := r.Referrers(t.Context(), remote, img.Manifest.Digest); !errors.Is(err, registry.ErrManifestUnknown) {
				t.Errorf("it has no referrers API: %v", err)
			}
			if o.Open {
				return
			}
			wrong, _ := BasicCredential("Basic dTp4")
			as, err := r.As(wrong)
			if err == nil {
				_, err = as.Head(t.Context(), remote, tag("v1"))
			}
			if !errors.Is(err, registry.ErrUnauthorized) {
				t.Errorf("a wrong password: %v", err)
			}
		})
	}
}
