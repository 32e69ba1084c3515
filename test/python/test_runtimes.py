"""Real clients: docker and skopeo push; docker, podman, ctr and a CRI containerd pull from an agent, by tag and by digest."""

import json
import os
import shutil
import subprocess
import tempfile
import time

import pytest

from components import ROOT, run
from utils import index_of, noise, small_image, tar_of, unique

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


def write_oci_layout(folder, image):
    """An OCI image layout of one image, for skopeo."""
    blobs = os.path.join(folder, "blobs", "sha256")
    os.makedirs(blobs)
    for d, b in list(image.blobs.items()) + [(image.digest, image.manifest)]:
        with open(os.path.join(blobs, d.split(":")[1]), "wb") as f:
            f.write(b)
    with open(os.path.join(folder, "oci-layout"), "w") as f:
        json.dump({"imageLayoutVersion": "1.0.0"}, f)
    d = image.descriptor()
    d["annotations"] = {"org.opencontainers.image.ref.name": "v1"}
    with open(os.path.join(folder, "index.json"), "w") as f:
        json.dump({"schemaVersion": 2, "manifests": [d]}, f)


def test_skopeo_push_and_copy_back(tool, cluster, proxy, tmp_path):
    """skopeo copies an OCI layout to the proxy and from an agent to a layout; the manifest's bytes stay as they were."""
    tool("skopeo")
    repo, image = unique("test/skopeo"), small_image()
    write_oci_layout(str(tmp_path / "in"), image)
    run("skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false", "oci:%s:v1" % (tmp_path / "in"), "docker://%s/%s:v1" % (cluster.proxy.addr, repo))
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


class Containerd:
    """A containerd of this test's own, with the CRI plugin and a hosts.toml that sends the proxy's name to an agent."""

    def __init__(self, mirrored, agent):
        self.dir = tempfile.mkdtemp(prefix="kc", dir="/tmp")
        self.sock = self.dir + "/c.sock"
        hosts = "%s/certs.d/%s" % (self.dir, mirrored)
        os.makedirs(hosts)
        with open(hosts + "/hosts.toml", "w") as f:
            f.write('server = "http://%s"\n[host."http://%s"]\n  capabilities = ["pull", "resolve"]\n' % (agent, agent))
        with open(self.dir + "/config.toml", "w") as f:
            f.write("""version = 2
root = "{0}/root"
state = "{0}/state"
[grpc]
  address = "{0}/c.sock"
[plugins."io.containerd.grpc.v1.cri"]
  disable_tcp_service = true
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{0}/certs.d"
""".format(self.dir))
        self.log = open(self.dir + "/log", "w")
        self.p = subprocess.Popen(["containerd", "--config", self.dir + "/config.toml"], stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + 30
        while self.ctr("version", check=False).returncode != 0:
            if time.monotonic() > deadline or self.p.poll() is not None:
                with open(self.dir + "/log") as f:
                    raise AssertionError("containerd did not start:\n" + f.read()[-3000:])
            time.sleep(0.1)

    def ctr(self, *args, **kw):
        return run("ctr", "-a", self.sock, *args, **kw)

    def crictl(self, *args, **kw):
        return run(os.path.join(ROOT, "bin", "tools", "crictl"), "--runtime-endpoint", "unix://" + self.sock, "--image-endpoint", "unix://" + self.sock, "--timeout", "120s", *args, **kw)

    def end(self):
        self.p.terminate()
        self.p.wait(30)
        self.log.close()
        shutil.rmtree(self.dir, ignore_errors=True)


@pytest.fixture
def containerd(tool, cluster):
    tool("containerd", "ctr")
    if os.geteuid() != 0:
        from conftest import skip
        skip("containerd needs root")
    c = Containerd(cluster.proxy.addr, cluster.agents[0].addr)
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
