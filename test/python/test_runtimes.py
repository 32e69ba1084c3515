"""Real clients: docker and skopeo push; docker, podman, ctr and a CRI containerd pull from an agent, by tag and by digest."""

import json
import os
import shutil
import tempfile

import pytest

from components import CA, SECURE, run
from containerd import Containerd
from utils import index_of, noise, small_image, tar_of, unique, write_oci_layout

BIG = 256 << 20


@pytest.fixture(scope="module")
def images(_cluster):
    """Images pushed by docker and by skopeo, small and with a layer of 256 MiB: name to (repository, manifest digest)."""
    return {}


def manifest_digest(registry, repo, ref="v1"):
    return registry.manifest(repo, ref).headers["Docker-Content-Digest"]


def docker_push(docker, proxy_addr, registry, files, repo):
    ref = "%s/%s:v1" % (proxy_addr, repo)
    with tempfile.NamedTemporaryFile(suffix=".tar") as f:
        f.write(tar_of(files))
        f.flush()
        docker("import", f.name, ref)
    try:
        docker("push", ref)
    finally:
        docker("rmi", "-f", ref)
    return manifest_digest(registry, repo)


@pytest.fixture
def small(cluster, proxy, docker, images):
    """A small image that docker has pushed."""
    if "small" not in images:
        repo = unique("test/docker-small")
        files = {"etc/motd": b"small\n", "bin/data": noise(3_000_000, repo)}
        images["small"] = repo, docker_push(docker, cluster.proxy.addr, proxy, files, repo)
    return images["small"]


@pytest.fixture
def big(cluster, proxy, docker, images):
    """An image with one layer of 256 MiB that docker has pushed."""
    if "big" not in images:
        repo = unique("test/docker-big")
        images["big"] = repo, docker_push(docker, cluster.proxy.addr, proxy, {"big": noise(BIG, repo)}, repo)
    return images["big"]


def test_skopeo_push_and_copy_back(tool, cluster, proxy, tmp_path):
    """skopeo copies an OCI layout to the proxy and from an agent to a layout; the manifest's bytes stay as they were."""
    tool("skopeo")
    repo, image = unique("test/skopeo"), small_image()
    write_oci_layout(str(tmp_path / "in"), image.descriptor(), dict(image.blobs, **{image.digest: image.manifest}))
    run("skopeo", "--insecure-policy", "copy", *([] if SECURE else ["--dest-tls-verify=false"]), "oci:%s:v1" % (tmp_path / "in"), "docker://%s/%s:v1" % (cluster.proxy.addr, repo))
    assert manifest_digest(proxy, repo) == image.digest
    for i, a in enumerate(cluster.agents):
        for ref in (":v1", "@" + image.digest):
            out = tmp_path / ("out%d%s" % (i, ref[0].replace(":", "t").replace("@", "d")))
            run("skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", "docker://%s/%s%s" % (a.addr, repo, ref), "oci:%s:v1" % out)
            with open(out / "blobs" / "sha256" / image.digest.split(":")[1], "rb") as f:
                assert f.read() == image.manifest


def test_docker_pull(docker, cluster, small, big):
    """docker pulls from an agent by tag and by digest."""
    addr = cluster.agents[1].addr
    for repo, digest in (small, big):
        for ref in (":v1", "@" + digest):
            name = "%s/%s%s" % (addr, repo, ref)
            out = docker("pull", name)
            assert digest in out
            docker("rmi", "-f", name)


def test_docker_pull_by_platform(docker, cluster, proxy):
    """docker resolves a multi-platform index at the agent."""
    repo = unique("test/docker-index")
    pair = [small_image(architecture=a) for a in ("amd64", "arm64")]
    for i in pair:
        proxy.push_image(repo, i.digest, i)
    kind, raw = index_of(pair)
    proxy.push_manifest(repo, "v1", kind, raw)
    name = "%s/%s:v1" % (cluster.agents[0].addr, repo)
    docker("pull", "--platform", "linux/arm64", name)
    assert json.loads(docker("image", "inspect", name))[0]["Architecture"] == "arm64"
    docker("rmi", "-f", name)


def test_podman_pull(tool, cluster, small, big):
    """podman pulls from an agent by tag and by digest."""
    tool("podman")
    home = tempfile.mkdtemp(prefix="kp", dir="/tmp")  # podman refuses a runroot of over 50 characters
    podman = ["podman", "--root", home + "/r", "--runroot", home + "/u", "--storage-driver", "vfs"]
    try:
        for repo, digest in (small, big):
            for ref in (":v1", "@" + digest):
                name = "%s/%s%s" % (cluster.agents[0].addr, repo, ref)
                run(*podman, "pull", "--tls-verify=false", name)
                got = run(*podman, "image", "inspect", "--format", "{{.Digest}}", name).stdout.strip()
                assert got == digest
                run(*podman, "rmi", "-f", name)
    finally:
        run(*podman, "system", "reset", "-f", check=False)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def containerd(tool, cluster):
    tool("containerd", "ctr")
    if os.geteuid() != 0:
        from conftest import skip
        skip("containerd needs root")
    c = Containerd(cluster.proxy.addr, cluster.agents[0].addr, CA if SECURE else None)
    yield c
    c.end()


def test_ctr_pull(containerd, cluster, small, big):
    """ctr pulls from an agent by tag and by digest."""
    for repo, digest in (small, big):
        for ref in (":v1", "@" + digest):
            name = "%s/%s%s" % (cluster.agents[1].addr, repo, ref)
            containerd.ctr("images", "pull", "--plain-http", name)
            assert digest in containerd.ctr("images", "ls", "name==" + name).stdout


def test_crictl_pull(containerd, cluster, small, big):
    """kubelet's interface: a CRI pull of the proxy's name goes to the agent, by tag and by digest."""
    before = cluster.agents[0].metrics()
    for repo, digest in (small, big):
        for ref in (":v1", "@" + digest):
            name = "%s/%s%s" % (cluster.proxy.addr, repo, ref)
            containerd.crictl("pull", name)
            out = containerd.crictl("inspecti", "-o", "json", name).stdout
            info = json.loads(out[out.index("{"):])  # warnings come before it
            assert any(d.endswith("@" + digest) for d in info["status"]["repoDigests"])
            containerd.crictl("rmi", name)
    after = cluster.agents[0].metrics()
    served = sum(after[k] - before.get(k, 0) for k in after if k.startswith(("kraken_agent_blob_hits_total", "kraken_agent_blob_misses_total")))
    assert served > 0, "the pull did not go through the agent"
