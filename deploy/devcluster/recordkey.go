package devcluster

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"

	"kraken/proto/cluster"
)

// recordKeyFile is the key that build-index signs name records with. It is beside its configuration, because a lost
// disk must not take it along: origins keep signed records of what was on that disk.
func (cl *Cluster) recordKeyFile() string {
	for _, c := range cl.Role("build-index") {
		return filepath.Join(filepath.Dir(cl.ConfigPath(c)), "record.key")
	}
	return filepath.Join(cl.Dir, "record.key")
}

// recordKey makes that key where there is none, and returns its public half for the origins.
func (cl *Cluster) recordKey() (string, error) {
	signer, _, err := cluster.OpenNameSigner(cl.recordKeyFile())
	if err != nil {
		return "", fmt.Errorf("key of name records: %w", err)
	}
	if cl.Runtime == "docker" && os.Geteuid() == 0 {
		err = os.Chown(cl.recordKeyFile(), containerUser, containerUser)
	} else if cl.Runtime == "docker" {
		err = os.Chmod(cl.recordKeyFile(), 0o644) // the container's user must read it; for development
	}
	return base64.StdEncoding.EncodeToString(signer.Public()), err
}
