package upstream

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	dockerconfig "github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/types"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/google"
)

// Credential is what is presented to an upstream. The zero value is nobody's.
type Credential struct {
	Username, Password string
	identity           string // a refresh token, exchanged at the realm
	bearer             string // presented as it is
}

// BasicCredential reads the value of an Authorization header of scheme Basic, which is what a runtime presents.
func BasicCredential(header string) (Credential, bool) {
	scheme, rest, _ := strings.Cut(header, " ")
	b, err := base64.StdEncoding.DecodeString(strings.TrimSpace(rest))
	user, password, ok := strings.Cut(string(b), ":")
	if !strings.EqualFold(scheme, "Basic") || err != nil || !ok || user == "" {
		return Credential{}, false
	}
	return newCredential(user, password), true
}

// newCredential returns the credential of a user, or of an identity token as docker's helpers spell one.
func newCredential(user, password string) Credential {
	if user == "<token>" {
		return Credential{identity: password}
	}
	return Credential{Username: user, Password: password}
}

func (c Credential) none() bool { return c == Credential{} }

// String keeps a credential out of logs.
func (c Credential) String() string { return "[redacted]" }

// GoString does the same for %#v.
func (c Credential) GoString() string { return c.String() }

func (c Credential) basic() string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(c.Username+":"+c.Password))
}

// digest returns a keyed hash of the credential, by which tokens and grants are found.
func (c Credential) digest(key []byte) [sha256.Size]byte {
	h := hmac.New(sha256.New, key)
	for _, s := range []string{c.Username, c.Password, c.identity, c.bearer} {
		fmt.Fprintf(h, "%d:%s", len(s), s)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// keychainGoogle is Credentials.Keychain for Google's registries.
const keychainGoogle = "google"

// credentialFor is how long what a file, a helper or a cloud says is used without asking again. Cloud credentials live
// for an hour at least.
const credentialFor = 5 * time.Minute

// source says what is presented to one registry.
type source struct {
	cfg  Credentials
	host string // as credentials are looked up: docker.io, registry.corp:5000

	mu    sync.Mutex
	last  Credential
	until time.Time
}

// get returns the credential now.
func (s *source) get(ctx context.Context) (Credential, error) {
	if s.cfg.Username != "" {
		return newCredential(s.cfg.Username, s.cfg.Password.Value()), nil
	}
	if s.cfg.none() {
		return Credential{}, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Now().Before(s.until) {
		return s.last, nil
	}
	c, err := s.read(ctx)
	if err != nil {
		return Credential{}, fmt.Errorf("credentials for %s: %w", s.host, err)
	}
	s.last, s.until = c, time.Now().Add(credentialFor)
	return c, nil
}

// forget makes the next get ask again: what it gave was refused.
func (s *source) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.until = time.Time{}
}

func (s *source) read(ctx context.Context) (Credential, error) {
	switch {
	case s.cfg.Keychain == keychainGoogle:
		a, err := authn.Resolve(ctx, google.Keychain, resource(s.host))
		if err != nil {
			return Credential{}, err
		}
		c, err := authn.Authorization(ctx, a)
		if err != nil {
			return Credential{}, err
		}
		return fromDocker(types.AuthConfig{Username: c.Username, Password: c.Password, Auth: c.Auth, IdentityToken: c.IdentityToken, RegistryToken: c.RegistryToken}), nil
	case s.cfg.Helper != "":
		f := configfile.New("")
		f.CredentialsStore = s.cfg.Helper
		return lookUp(f, s.host)
	}
	r, err := os.Open(s.cfg.DockerConfig)
	if err != nil {
		return Credential{}, err
	}
	defer r.Close()
	f, err := dockerconfig.LoadFromReader(r)
	if err != nil {
		return Credential{}, err
	}
	return lookUp(f, s.host)
}

// dockerHubKey is the name of Docker Hub in docker's own files.
const dockerHubKey = "https://index.docker.io/v1/"

// lookUp returns what a docker configuration has for a registry, nobody's where it has nothing.
func lookUp(f *configfile.ConfigFile, host string) (Credential, error) {
	keys := []string{host}
	if host == "docker.io" {
		keys = []string{dockerHubKey, host}
	}
	for _, key := range keys {
		a, err := f.GetAuthConfig(key)
		if err != nil {
			return Credential{}, err
		}
		a.ServerAddress = ""
		if a != (types.AuthConfig{}) {
			return fromDocker(a), nil
		}
	}
	return Credential{}, nil
}

func fromDocker(a types.AuthConfig) Credential {
	switch {
	case a.RegistryToken != "":
		return Credential{bearer: a.RegistryToken}
	case a.IdentityToken != "":
		return Credential{identity: a.IdentityToken}
	}
	return newCredential(a.Username, a.Password)
}

// resource is a registry as authn's keychains name one.
type resource string

func (r resource) String() string      { return string(r) }
func (r resource) RegistryStr() string { return string(r) }
