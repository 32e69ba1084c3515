package devcluster

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"kraken/deploy/certs"
	"kraken/proto/transport"
)

// Files of a certificate that a cluster with mutual TLS gave out, all PEM.
type Files struct {
	CA, Cert, Key string
}

// ClusterName is what the certificates of a development cluster name as their cluster.
const ClusterName = "dev"

// CertificateDir is the folder of a cluster's authority, which `kraken certs --dir` takes.
func (cl *Cluster) CertificateDir() string { return certificateDir(cl.Dir) }

func certificateDir(dir string) string { return filepath.Join(dir, "tls") }

// Certificate names the files of whom the cluster's authority certified by that id: every component's, and who Issue
// was called for.
func (cl *Cluster) Certificate(id string) Files { return CertificateIn(cl.Dir, id) }

// CertificateIn is Certificate of the cluster that has its folder there, or will have.
func CertificateIn(dir, id string) Files {
	base := filepath.Join(certificateDir(dir), string(roleOf(id)), id)
	return Files{CA: filepath.Join(certificateDir(dir), certs.AuthorityFile), Cert: base + ".pem", Key: base + ".key"}
}

// writeCertificates makes an authority, and a certificate for each component and for an operator.
func (cl *Cluster) writeCertificates() error {
	if _, err := certs.Open(cl.CertificateDir()); err != nil {
		if _, err := certs.Init(cl.CertificateDir(), ClusterName, certs.AuthorityLife); err != nil {
			return err
		}
	}
	for _, c := range cl.Components {
		if _, err := cl.Issue(c.ID()); err != nil {
			return err
		}
	}
	_, err := cl.Issue("operator")
	return err
}

// Issue gives id a certificate of the cluster's authority. Its role is what stands before the number in an id such as
// origin-01, and that of an agent where that is no role. Up must have been called.
func (cl *Cluster) Issue(id string) (Files, error) {
	a, err := certs.Open(cl.CertificateDir())
	if err == nil {
		_, err = a.Issue(certs.Request{Role: roleOf(id), ID: id, Hosts: cl.hostsOf(id), Life: certs.CertificateLife})
	}
	if err != nil {
		return Files{}, fmt.Errorf("certificate of %s: %w", id, err)
	}
	return cl.Certificate(id), nil
}

// hostsOf are what others call the holder of a certificate by.
func (cl *Cluster) hostsOf(id string) []string {
	hosts := []string{id, "localhost", loopback.IP}
	for _, c := range cl.Components {
		if ip := c.Host().IP; c.ID() == id && !slices.Contains(hosts, ip) {
			hosts = append(hosts, ip)
		}
	}
	return hosts
}

func roleOf(id string) transport.Role {
	role := id
	if i := strings.LastIndexByte(id, '-'); i > 0 && strings.Trim(id[i+1:], "0123456789") == "" {
		role = id[:i]
	}
	if r := transport.Role(role); slices.Contains(transport.Roles, r) {
		return r
	}
	return transport.RoleAgent
}
