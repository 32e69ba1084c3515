package mirror

import (
	"fmt"
	"io"
	"strings"
)

// Platforms are those that Explain knows: systems that write runtimes' configuration themselves.
var Platforms = []string{"eks", "gke", "talos", "bottlerocket"}

// Explain prints what to put where on a platform whose nodes are not configured by files of one's own.
func Explain(platform string, s Settings, out io.Writer) error {
	if err := s.check(); err != nil {
		return err
	}
	var err error
	switch platform {
	case "eks":
		_, err = io.WriteString(out, explainEKS(s))
	case "gke":
		_, err = io.WriteString(out, explainGKE(s))
	case "talos":
		_, err = io.WriteString(out, explainTalos(s))
	case "bottlerocket":
		_, err = io.WriteString(out, explainBottlerocket(s))
	default:
		return fmt.Errorf("platform %q: want one of %s", platform, strings.Join(Platforms, ", "))
	}
	return err
}

// explainEKS overrides the list that the node's default config_path is: containerd 2.x takes it for one path.
func explainEKS(s Settings) string {
	folders := s.Registries
	if len(folders) == 0 {
		folders = []string{"_default"}
	}
	var hosts strings.Builder
	for _, f := range folders {
		fmt.Fprintf(&hosts, "mkdir -p '%s/%s'\ncat > '%s/%s/hosts.toml' <<'EOF'\n%sEOF\n", certsD, f, certsD, f, newHostsTOML(s, version{}))
	}
	return `# Amazon EKS, AL2023: user data of the launch template, a multi-part document. The first part overrides config_path: the default
# there is a list, which containerd 2.x takes for one path, so that no mirror is used and nothing says so.
--BOUNDARY
Content-Type: application/node.eks.aws

apiVersion: node.eks.aws/v1alpha1
kind: NodeConfig
spec:
  containerd:
    config: |
      [plugins."io.containerd.cri.v1.images".registry]
      config_path = "` + certsD + `"
      [plugins."io.containerd.transfer.v1.local"]
      config_path = "` + certsD + `"
--BOUNDARY
Content-Type: text/x-shellscript

#!/bin/bash
` + hosts.String() + `--BOUNDARY--
# Or, on nodes that run already, from a privileged pod: kraken-agent mirror install --root /host --config FILE
`
}

// explainGKE lists registries: wildcards are not supported there, and at most 25.
func explainGKE(s Settings) string {
	var b strings.Builder
	b.WriteString(`# GKE: a runtime configuration file. Wildcards are not supported, and at most 25 registries.
# gcloud container node-pools update POOL --cluster CLUSTER --containerd-config-from-file=FILE
registryHosts:
`)
	for _, r := range s.listed() {
		server := r
		if s.NoFallback {
			server = s.Agent
		}
		fmt.Fprintf(&b, "- server: %q\n  hosts:\n  - host: %q\n    capabilities: [\"HOST_CAPABILITY_PULL\", \"HOST_CAPABILITY_RESOLVE\"]\n    dialTimeout: \"1s\"\n", server, s.Agent)
	}
	return b.String()
}

func explainTalos(s Settings) string {
	registries := s.Registries
	if len(registries) == 0 {
		registries = []string{"*"}
	}
	var b strings.Builder
	b.WriteString("# Talos: a patch of the machine configuration: talosctl patch mc --patch @FILE\nmachine:\n  registries:\n    mirrors:\n")
	for _, r := range registries {
		fmt.Fprintf(&b, "      %q:\n        endpoints: [%q]\n", r, s.Agent)
		if s.NoFallback {
			b.WriteString("        skipFallback: true\n")
		}
	}
	return b.String()
}

func explainBottlerocket(s Settings) string {
	registries := s.Registries
	if len(registries) == 0 {
		registries = []string{"*"}
	}
	var b strings.Builder
	b.WriteString("# Bottlerocket: user data (settings). The registry itself stays the fall-back.\n")
	for _, r := range registries {
		fmt.Fprintf(&b, "[[settings.container-registry.mirrors]]\nregistry = %q\nendpoint = [%q]\n", r, s.Agent)
	}
	return b.String()
}
