package main

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"
)

// containerUser is the uid and gid in the images, see deploy/docker.
const containerUser = 65532

// containers runs components with docker on the host's network, one container each, named as the component. A handle is the
// container's id, so that only what this command made is ever ended.
type containers struct{}

func (containers) docker(ctx context.Context, args ...string) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("docker %s: %w: %s", args[0], err, strings.TrimSpace(stderr.String()))
	}
	return stdout.Bytes(), nil
}

func (d containers) start(ctx context.Context, cl *cluster, c *component) (string, error) {
	// A stopped container of an earlier start of this component, ours by its label, makes room for the new one.
	old, err := d.docker(ctx, "ps", "-aq", "--filter", "name=^/"+c.Name+"$", "--filter", "label=kraken.devcluster="+cl.Dir)
	if err != nil {
		return "", fmt.Errorf("%w (is the docker daemon running?)", err)
	}
	if id := strings.TrimSpace(string(old)); id != "" {
		if _, err := d.docker(ctx, "rm", id); err != nil {
			return "", err
		}
	}
	dir := cl.Dir + "/" + c.Name
	args := []string{"run", "-d", "--name", c.Name, "--label", "kraken.devcluster=" + cl.Dir, "--network", "host", "--read-only",
		"--cap-drop", "ALL", "--security-opt", "no-new-privileges",
		"-v", dir + ":" + dir + ":ro", "-v", cl.stateDir(c) + ":" + cl.stateDir(c), "kraken-" + c.Role + ":dev"}
	id, err := d.docker(ctx, append(args, cl.args(c)...)...)
	if err != nil {
		return "", fmt.Errorf("%w (were the images built? `make images`)", err)
	}
	return strings.TrimSpace(string(id)), nil
}

func (d containers) alive(ctx context.Context, c *component) bool {
	out, err := d.docker(ctx, "inspect", "-f", "{{.State.Running}}", c.Handle)
	return err == nil && strings.TrimSpace(string(out)) == "true"
}

func (d containers) stop(ctx context.Context, c *component, kill bool) error {
	verb := []string{"stop", "-t", "35"}
	if kill {
		verb = []string{"kill"}
	}
	if d.alive(ctx, c) {
		if _, err := d.docker(ctx, append(verb, c.Handle)...); err != nil {
			return err
		}
	}
	_, err := d.docker(ctx, "rm", "-f", c.Handle)
	return err
}

func (d containers) logs(ctx context.Context, c *component) ([]byte, error) {
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, "docker", "logs", c.Name)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.Bytes(), err
}
