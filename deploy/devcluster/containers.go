package devcluster

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"
)

// containerUser is the uid and gid in the images, see deploy/docker.
const containerUser = 65532

// label marks the containers of dev clusters; its value is the cluster's folder.
const label = "kraken.devcluster"

// containers runs components with docker on the host's network, one container each, named as the component. A handle is
// the container's id, so that only what this command made is ever ended.
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

func (d containers) start(ctx context.Context, cl *Cluster, c *Component) (string, error) {
	if err := d.makeRoom(ctx, c.Name); err != nil {
		return "", err
	}
	dir := cl.Dir + "/" + c.Name
	args := []string{"run", "-d", "--name", c.Name, "--label", label + "=" + cl.Dir, "--network", "host", "--read-only",
		"--cap-drop", "ALL", "--security-opt", "no-new-privileges",
		"-v", dir + ":" + dir + ":ro", "-v", cl.StateDir(c) + ":" + cl.StateDir(c), "kraken-" + c.Role + ":dev"}
	id, err := d.docker(ctx, append(args, cl.args(c)...)...)
	if err != nil {
		return "", fmt.Errorf("%w (were the images built? `make images`)", err)
	}
	return strings.TrimSpace(string(id)), nil
}

// makeRoom removes the container of that name which a cluster left when it was cut off, by a reboot say, in whatever
// checkout. It has nothing that matters: state and configuration are in its cluster's folder. One that runs, or isn't a
// dev cluster's, stays.
func (d containers) makeRoom(ctx context.Context, name string) error {
	out, err := d.docker(ctx, "ps", "-a", "--filter", "name=^/"+name+"$", "--format", `{{.ID}}\t{{.State}}\t{{.Label "`+label+`"}}`)
	if err != nil {
		return fmt.Errorf("%w (is the docker daemon running?)", err)
	}
	if len(bytes.TrimSpace(out)) == 0 {
		return nil
	}
	fields := strings.Split(strings.TrimRight(string(out), "\n"), "\t")
	if len(fields) != 3 {
		return fmt.Errorf("docker ps: expected id, state and label of container %s, got %q", name, out)
	}
	id, state, dir := fields[0], fields[1], fields[2]
	switch {
	case dir == "":
		return fmt.Errorf("a container named %s exists (%s) that no dev cluster made: remove or rename it, `docker rm -f %s`", name, state, id)
	case state == "running" || state == "paused" || state == "restarting":
		return fmt.Errorf("container %s is %s for the dev cluster of %s: end that with `make stop-devcluster` there, or `docker rm -f %s`", name, state, dir, id)
	}
	_, err = d.docker(ctx, "rm", id)
	return err
}

func (d containers) alive(ctx context.Context, c *Component) bool {
	out, err := d.docker(ctx, "inspect", "-f", "{{.State.Running}}", c.Handle)
	return err == nil && strings.TrimSpace(string(out)) == "true"
}

func (d containers) stop(ctx context.Context, c *Component, kill bool) error {
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

func (d containers) logs(ctx context.Context, c *Component) ([]byte, error) {
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, "docker", "logs", c.Name)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.Bytes(), err
}
