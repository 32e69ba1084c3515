// Package login is the front door's keeper: who a client is, by password, robot key, ID token, certificate or token;
// Docker's token service; the line that is written of each change and each refusal. What a caller may do is decided by
// package proto/access.
package login

import (
	"fmt"
	"os"
	"time"

	"kraken/proto/access"
	"kraken/proto/config"
)

// Config says who may come in, and what they may do. Without Rules everybody may do everything.
type Config struct {
	// Rules is the file that says who may do what (access.Policy). It is read again when it changes; what can't be read
	// leaves the rules before it.
	Rules string `yaml:"rules"`
	// Htpasswd is a file of users with bcrypt hashes, as htpasswd -B writes it. It is read again when it changes.
	Htpasswd string `yaml:"htpasswd"`
	// OIDC are the issuers whose ID tokens are taken, as the password of the user oidc, or as a bearer.
	OIDC []access.IssuerConfig `yaml:"oidc"`
	// Certificates makes the name in a client certificate a login, cert:<common name>; server.tls.client_ca says whose,
	// and server.tls.client_optional lets others in without.
	Certificates bool `yaml:"certificates"`
	// Realm is the URL of the token service that clients are sent to. Default: /token at the host, and by the scheme,
	// by which the client came (X-Forwarded-Proto counts).
	Realm string `yaml:"realm"`
	// Service is the name of this registry in tokens, default kraken; the same at all proxies and agents.
	Service string `yaml:"service"`
	// TokenLifetime is how long a token is valid, 1m to 1h, default 5m.
	TokenLifetime config.Duration `yaml:"token_lifetime" config:"positive"`
	// KeyLifetime is how long a proxy signs with one key before it makes another, default 24h.
	KeyLifetime config.Duration `yaml:"key_lifetime" config:"positive"`
	// Audit is the file that gets a line of JSON for each change and each refusal, "stdout", or empty for none.
	Audit string `yaml:"audit"`
}

// Enabled reports whether access is controlled.
func (c *Config) Enabled() bool { return c.Rules != "" }

// Validate fills in defaults and puts what is wrong into m, under key.
func (c *Config) Validate(m *config.Mistakes, key string) {
	if c.Service == "" {
		c.Service = "kraken"
	}
	if c.TokenLifetime == 0 {
		c.TokenLifetime = config.Duration(5 * time.Minute)
	}
	if c.KeyLifetime == 0 {
		c.KeyLifetime = config.Duration(24 * time.Hour)
	}
	if d := time.Duration(c.TokenLifetime); d < time.Minute || d > time.Hour {
		m.Add(key+".token_lifetime", "%s is not in 1m..1h", d)
	}
	if d := time.Duration(c.KeyLifetime); d < 5*time.Second || d > 14*24*time.Hour {
		m.Add(key+".key_lifetime", "%s is not in 5s..336h", d)
	} else if least := time.Duration(c.TokenLifetime) / 60; d < least {
		m.Add(key+".key_lifetime", "%s is less than a sixtieth of token_lifetime, %s: too many keys would have to be kept", d, least)
	}
	if c.Rules == "" {
		if c.Htpasswd != "" || len(c.OIDC) > 0 || c.Certificates {
			m.Add(key+".rules", "is needed: without rules everybody may do everything, and logins would mean nothing")
		}
		return
	}
	for name, file := range map[string]string{"rules": c.Rules, "htpasswd": c.Htpasswd} {
		if file == "" {
			continue
		}
		m.Path(key+"."+name, file)
		b, err := os.ReadFile(file)
		if err == nil && name == "rules" {
			_, err = access.ParsePolicy(file, b)
		} else if err == nil {
			_, err = parseHtpasswd(file, b)
		}
		if err != nil {
			m.Add(key+"."+name, "%w", err)
		}
	}
	for i := range c.OIDC {
		c.OIDC[i].Validate(m, fmt.Sprintf("%s.oidc[%d]", key, i))
	}
	access.CheckRealm(m, key+".realm", c.Realm)
	if c.Audit != "" && c.Audit != "stdout" {
		m.Path(key+".audit", c.Audit)
	}
}
