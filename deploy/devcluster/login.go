package devcluster

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/crypto/bcrypt"
)

// LoginUser is the user of a cluster with Login, who may do everything.
const LoginUser = "admin"

// loginRules are the rules of a cluster with Login; people change them while it runs.
const loginRules = `# Who may do what in this cluster; deploy/config/access.yaml explains it. Read again when it changes.
rules:
  - {repositories: ["**"], subjects: [` + LoginUser + `], allow: [pull, push, delete, overwrite]}
  - {repositories: ["public/**"], subjects: [anonymous], allow: [pull]}
`

func (cl *Cluster) rulesFile() string    { return filepath.Join(cl.Dir, "access.yaml") }
func (cl *Cluster) htpasswdFile() string { return filepath.Join(cl.Dir, "htpasswd") }
func (cl *Cluster) passwordFile() string { return filepath.Join(cl.Dir, "password") }

// Password returns the password of LoginUser in a cluster with Login that was written.
func (cl *Cluster) Password() (string, error) {
	b, err := os.ReadFile(cl.passwordFile())
	if err != nil {
		return "", fmt.Errorf("password of %s: %w", LoginUser, err)
	}
	return strings.TrimSpace(string(b)), nil
}

// writeLogin makes the rules, the user and the password, those that are not there yet.
func (cl *Cluster) writeLogin() error {
	password, err := cl.Password()
	if errors.Is(err, fs.ErrNotExist) {
		password = rand.Text()
		err = os.WriteFile(cl.passwordFile(), []byte(password+"\n"), 0o600)
	}
	if err != nil {
		return err
	}
	if _, err := os.Stat(cl.htpasswdFile()); errors.Is(err, fs.ErrNotExist) {
		hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.DefaultCost)
		if err != nil {
			return err
		}
		if err := os.WriteFile(cl.htpasswdFile(), fmt.Appendf(nil, "%s:%s\n", LoginUser, hash), 0o600); err != nil {
			return err
		}
	}
	if _, err := os.Stat(cl.rulesFile()); errors.Is(err, fs.ErrNotExist) {
		return os.WriteFile(cl.rulesFile(), []byte(loginRules), 0o600)
	}
	return nil
}
