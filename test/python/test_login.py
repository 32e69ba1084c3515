"""The front door with logins: a cluster of its own whose proxy and agent ask who somebody is, real clients that log in, the conformance suite behind a
login, the commands that make and revoke robots."""

import base64
import json
import os
import re
import shutil
import tempfile
import time

import pytest
import requests

from components import ROOT, run
from conftest import TABLES, skip
from containerd import Containerd
from test_conformance import ALL, conformance, whole
from utils import Registry, have, small_image, unique, write_oci_layout

pytestmark = pytest.mark.plain("it has a cluster of its own, which asks who somebody is")

TOOLS = os.path.join(ROOT, "bin", "tools")
DEVCLUSTER, PROXY = os.path.join(ROOT, "bin", "devcluster"), os.path.join(ROOT, "bin", "kraken-proxy")

RULES = """
rules:
  - {repositories: ["public/**"], subjects: [anonymous], allow: [pull]}
  - {repositories: ["**"], subjects: [ann], allow: [pull, push, delete, overwrite]}
  - {repositories: ["test/**"], subjects: [robot+ci, "dex:tester@kraken.test"], allow: [pull, push]}
"""
# The passwords of these are ann-secret and eve-secret.
HTPASSWD = """ann:$2a$05$dlzviOGRm/ae.kfaNMK77uqc76RR1sazp2MXs0zEbjRovP3SzY1ZC
eve:$2a$05$VSXk381m.AHjVE.GVXRbfeI0tSU7h3M7SNxralSmA25lJm0O/cVdm
"""
ANN = ("ann", "ann-secret")


class Guarded:
    """A cluster with access control on free ports. issuers are the proxy's `access.oidc`."""

    def __init__(self, issuers=(), rules=RULES):
        self.dir = tempfile.mkdtemp(prefix="kraken-login-")
        self.write("rules.yaml", rules)
        self.write("htpasswd", HTPASSWD)
        proxy = {"rules": self.path("rules.yaml"), "htpasswd": self.path("htpasswd"), "audit": self.path("audit.jsonl"), "oidc": list(issuers)}
        self.up({"proxy": {"access": proxy}})
        # The agent is told where tokens are once it is known; it is configured by that file alone.
        agent = {"rules": self.path("rules.yaml"), "realm": "http://%s/token" % self.proxy, "modes": [{"repositories": "**", "mode": "caller"}]}
        path = os.path.join(self.dir, "c", "kraken-agent-01", "config.yaml")
        self.control("stop", "kraken-agent-01")
        with open(path, "a") as f:
            f.write("\naccess: %s\n" % json.dumps(agent))
        self.control("start", "kraken-agent-01")
        deadline = time.monotonic() + 30
        while requests.get("http://%s/token" % self.proxy, timeout=5).status_code != 200:
            assert time.monotonic() < deadline, "no tokens"
            time.sleep(0.1)

    def up(self, config):
        with open(self.path("layout.json"), "w") as f:
            json.dump({"config": config}, f)
        run(DEVCLUSTER, "--dir", self.path("c"), "--bin", os.path.join(ROOT, "bin"), "up", "--free-ports", "--agents", 1, "--layout", self.path("layout.json"))

    def control(self, *args):
        run(DEVCLUSTER, "--dir", self.path("c"), "--bin", os.path.join(ROOT, "bin"), *args)

    def path(self, name):
        return os.path.join(self.dir, name)

    def write(self, name, text):
        with open(self.path(name + ".new"), "w") as f:
            f.write(text)
        os.rename(self.path(name + ".new"), self.path(name))

    def addr(self, name):
        with open(os.path.join(self.dir, "c", "cluster.json")) as f:
            return next(c["addr"] for c in json.load(f)["components"] if c["name"] == "kraken-" + name)

    @property
    def proxy(self):
        return self.addr("proxy-01")

    @property
    def agent(self):
        return self.addr("agent-01")

    def registry(self, user=None, password=None):
        return Registry(self.proxy, auth=(user, password) if user else None)

    def command(self, *args, **kw):
        """A command of kraken-proxy."""
        return run(PROXY, *args, "--config", os.path.join(self.dir, "c", "kraken-proxy-01", "config.yaml"), **kw)

    def audit(self):
        with open(self.path("audit.jsonl")) as f:
            return [json.loads(line) for line in f]

    def end(self):
        run(DEVCLUSTER, "--dir", self.path("c"), "down", check=False)
        shutil.rmtree(self.dir, ignore_errors=True)


@pytest.fixture(scope="module")
def guarded():
    g = Guarded()
    yield g
    g.end()


@pytest.fixture(scope="module")
def table():
    rows = []
    yield rows
    TABLES.append("\n".join("%s: %s" % row for row in rows))


@pytest.mark.parametrize("version", ["1.0", "1.1", "dev"])
def test_conformance_behind_a_login(guarded, table, version):
    """Every switch on, as without a login: nothing fails and nothing is left out."""
    settings = dict(ALL, DATA_SPARSE="false", USERNAME=ANN[0], PASSWORD=ANN[1])
    counts, wrong = conformance(table, "login-" + version, guarded.proxy, version, unique("conformance"), settings)
    whole(counts, wrong)


class Client:
    """One client: login, push and pull of a layout v1 of an image at a name. What it says must have no password. With ca, a file, it speaks TLS and trusts
    that authority and no other; without, it speaks plain HTTP."""

    needs = ()

    def __init__(self, dir, ca=None):
        self.dir, self.ca = dir, ca

    def run(self, *args, **kw):
        env = dict(os.environ, HOME=self.dir, DOCKER_CONFIG=self.dir, REGISTRY_AUTH_FILE=os.path.join(self.dir, "auth.json"), XDG_RUNTIME_DIR=self.dir)
        if self.ca:
            env["SSL_CERT_FILE"] = self.ca
        return run(*args, env=env, **kw)

    def plain(self, *flags):
        """The flags that plain HTTP needs."""
        return [] if self.ca else list(flags)

    def end(self):
        pass


class Docker(Client):
    needs = ("docker",)

    def login(self, addr, user, password, check=True):
        return self.run("docker", "login", addr, "-u", user, "--password-stdin", input=password, check=check)

    def push(self, layout, name):
        tar = os.path.join(self.dir, "i.tar")
        self.run("skopeo", "--insecure-policy", "copy", "oci:%s:v1" % layout, "docker-archive:%s:%s" % (tar, name))
        self.run("docker", "load", "-i", tar)
        self.run("docker", "push", name)
        self.run("docker", "rmi", "-f", name)

    def pull(self, name, check=True):
        p = self.run("docker", "pull", name, check=check)
        self.run("docker", "rmi", "-f", name, check=False)
        return p


class Podman(Client):
    needs = ("podman",)
    program = "podman"

    def __init__(self, dir, ca=None):
        super().__init__(dir, ca)
        self.home = tempfile.mkdtemp(prefix="k", dir="/tmp")

    def pod(self, *args, **kw):
        return self.run(self.program, "--root", self.home + "/r", "--runroot", self.home + "/u", "--storage-driver", "vfs", *args, **kw)

    def login(self, addr, user, password, check=True):
        return self.pod("login", *self.plain("--tls-verify=false"), "-u", user, "--password-stdin", addr, input=password, check=check)

    def push(self, layout, name):
        image = self.pod("pull", "-q", "oci:%s:v1" % layout).stdout.split()[-1]
        self.pod("push", *self.plain("--tls-verify=false"), image, "docker://" + name)
        self.pod("rmi", "-f", image)

    def pull(self, name, check=True):
        return self.pod("pull", *self.plain("--tls-verify=false"), name, check=check)

    def end(self):
        self.pod("rmi", "-a", "-f", check=False)
        shutil.rmtree(self.home, ignore_errors=True)


class Buildah(Podman):
    needs = ("buildah",)
    program = "buildah"


class Skopeo(Client):
    needs = ("skopeo",)

    def login(self, addr, user, password, check=True):
        return self.run("skopeo", "login", *self.plain("--tls-verify=false"), "-u", user, "--password-stdin", addr, input=password, check=check)

    def push(self, layout, name):
        self.run("skopeo", "--insecure-policy", "copy", *self.plain("--dest-tls-verify=false"), "oci:%s:v1" % layout, "docker://" + name)

    def pull(self, name, check=True):
        return self.run("skopeo", "--insecure-policy", "copy", *self.plain("--src-tls-verify=false"), "docker://" + name, "dir:" + tempfile.mkdtemp(dir=self.dir), check=check)


class Crane(Client):
    tool = os.path.join(TOOLS, "crane")

    def login(self, addr, user, password, check=True):
        self.run(self.tool, "auth", "login", addr, "-u", user, "--password-stdin", input=password)
        return self.run(self.tool, "catalog", *self.plain("--insecure"), addr, check=check)  # the login itself asks nobody

    def push(self, layout, name):
        self.run(self.tool, "push", *self.plain("--insecure"), layout, name)
        self.run(self.tool, "copy", *self.plain("--insecure"), name, name.replace(":v1", "-copy:v1"))  # by mounts

    def pull(self, name, check=True):
        return self.run(self.tool, "pull", *self.plain("--insecure"), name, os.path.join(tempfile.mkdtemp(dir=self.dir), "x"), check=check)


class Regctl(Client):
    tool = os.path.join(TOOLS, "regctl")

    def scheme(self, addr):
        self.run(self.tool, "registry", "set", "--skip-check", "--tls", "enabled" if self.ca else "disabled", addr)

    def login(self, addr, user, password, check=True):
        self.scheme(addr)
        return self.run(self.tool, "registry", "login", addr, "-u", user, "--pass-stdin", input=password, check=check)

    def push(self, layout, name):
        self.run(self.tool, "image", "copy", "ocidir://%s:v1" % layout, name)

    def pull(self, name, check=True):
        self.scheme(name.split("/")[0])
        return self.run(self.tool, "image", "copy", name, "ocidir://%s:v1" % os.path.join(tempfile.mkdtemp(dir=self.dir), "x"), check=check)


class Oras(Client):
    tool = os.path.join(TOOLS, "oras")

    def login(self, addr, user, password, check=True):
        return self.run(self.tool, "login", *self.plain("--plain-http"), addr, "-u", user, "--password-stdin", input=password, check=check)

    def push(self, layout, name):
        self.run(self.tool, "cp", "--from-oci-layout", "%s:v1" % layout, *self.plain("--to-plain-http"), name)

    def pull(self, name, check=True):
        return self.run(self.tool, "cp", *self.plain("--from-plain-http"), name, "--to-oci-layout", "%s:v1" % os.path.join(tempfile.mkdtemp(dir=self.dir), "x"), check=check)


class Helm(Client):
    """It pushes charts of its own: the repository's last part is the chart's name."""

    tool = os.path.join(TOOLS, "helm")
    version = "1.0.0"

    def login(self, addr, user, password, check=True):
        return self.run(self.tool, "registry", "login", *self.plain("--plain-http"), addr, "-u", user, "--password-stdin", input=password, check=check)

    def push(self, layout, name):
        folder, chart = name.rpartition(":")[0].rsplit("/", 1)
        at = os.path.join(tempfile.mkdtemp(dir=self.dir), chart)
        os.mkdir(at)
        with open(os.path.join(at, "Chart.yaml"), "w") as f:
            json.dump({"apiVersion": "v2", "name": chart, "version": self.version}, f)
        self.run(self.tool, "package", at, "--destination", self.dir)
        self.run(self.tool, "push", *self.plain("--plain-http"), os.path.join(self.dir, "%s-%s.tgz" % (chart, self.version)), "oci://" + folder)

    def pull(self, name, check=True):
        return self.run(self.tool, "pull", *self.plain("--plain-http"), "oci://" + name.rpartition(":")[0], "--version", self.version, "--destination", tempfile.mkdtemp(dir=self.dir), check=check)


CLIENTS = {"docker": Docker, "podman": Podman, "buildah": Buildah, "skopeo": Skopeo, "crane": Crane, "regctl": Regctl, "oras": Oras, "helm": Helm}


@pytest.fixture
def image(tmp_path):
    """An image, and its layout on disk."""
    i = small_image()
    layout = str(tmp_path / "layout")
    os.makedirs(layout)
    blobs = dict(i.blobs)
    blobs[i.digest] = i.manifest
    write_oci_layout(layout, i.descriptor(), blobs)
    return i, layout


def client_of(name, dir, ca=None):
    kind = CLIENTS[name]
    for n in kind.needs:
        if not have(n):
            skip("%s is not installed: run test/setup.sh as root" % n)
    if name == "docker" and run("docker", "info", check=False).returncode != 0:
        skip("no docker daemon answers: start dockerd, or run test/setup.sh as root")
    os.makedirs(dir)
    with open(os.path.join(dir, "auth.json"), "w") as f:
        f.write("{}")  # podman wants the file that it is told of
    return kind(dir, ca)


@pytest.mark.parametrize("name", CLIENTS)
def test_client_logs_in(guarded, image, tmp_path, name):
    """Without a login a client is refused, with a wrong password too; with the right one it pushes and pulls."""
    i, layout = image
    repo = unique("test/login")
    ref = "%s/%s:v1" % (guarded.proxy, repo)
    guarded.registry(*ANN).push_image(repo, "old", small_image())
    c = client_of(name, str(tmp_path / "home"))
    try:
        refused = c.pull(ref.replace(":v1", ":old"), check=False)
        assert refused.returncode != 0 and re.search(r"(?i)unauthorized|authentication required|access denied|denied|401", refused.stdout), refused.stdout
        assert c.login(guarded.proxy, "ann", "wrong", check=False).returncode != 0
        c.login(guarded.proxy, *ANN)
        c.push(layout, ref)
        c.pull(ref)
    finally:
        c.end()
    got = guarded.registry(*ANN)
    if name in ("skopeo", "crane", "regctl", "oras"):  # the others make manifests of their own
        got.check_image(repo, "v1", i)
    changes = [e for e in guarded.audit() if e["event"] == "change" and e["repository"] == repo]
    assert changes and all(e["subject"] == "ann" and e["digest"].startswith("sha256:") for e in changes)


@pytest.fixture
def containerd(guarded):
    if not have("containerd"):
        skip("containerd is not installed: run test/setup.sh as root")
    if os.geteuid() != 0:
        skip("containerd needs root")
    c = Containerd(guarded.proxy, guarded.agent)
    yield c
    c.end()


def test_ctr_logs_in(guarded, containerd):
    repo, i = unique("test/ctr"), small_image()
    guarded.registry(*ANN).push_image(repo, "v1", i)
    ref = "%s/%s:v1" % (guarded.proxy, repo)
    assert containerd.ctr("images", "pull", *containerd.proxy(), ref, check=False).returncode != 0
    containerd.ctr("images", "pull", *containerd.proxy(ANN), ref)
    containerd.ctr("images", "tag", ref, ref.replace(":v1", ":v2"))
    containerd.ctr("images", "push", *containerd.proxy(ANN), ref.replace(":v1", ":v2"))
    guarded.registry(*ANN).check_image(repo, "v2", i)


def test_kubelet_pulls_with_a_pull_secret(guarded, containerd):
    """By an agent that asks each caller: a pod with a pull secret gets its image, one without does not, nor one of somebody who may not."""
    repo, i = unique("test/cri"), small_image()
    guarded.registry(*ANN).push_image(repo, "v1", i)
    ref = "%s/%s:v1" % (guarded.proxy, repo)
    crictl = os.path.join(TOOLS, "crictl")
    if not os.path.exists(crictl):
        skip("crictl is not built: make test-tools")
    for creds, ok in ((None, False), ("eve:eve-secret", False), ("ann:wrong", False), ("ann:ann-secret", True)):
        args = ["pull"] + (["--creds", creds] if creds else []) + [ref]
        p = containerd.crictl(*args, check=False)
        assert (p.returncode == 0) == ok, "%s: %s" % (creds, p.stdout)
    containerd.crictl("rmi", ref)


def test_robots(guarded):
    """A robot is made, used, listed and revoked by command; its key and its token end within seconds."""
    out = guarded.command("robot", "add", "ci", "--expires", "1h", "--note", "tests").stdout
    user, key = re.search(r"user: +(\S+)", out).group(1), re.search(r"password: +(\S+)", out).group(1)
    assert user == "robot+ci" and key.startswith("krk_")
    listed = guarded.command("robot", "list").stdout
    assert "robot+ci" in listed and "tests" in listed and key not in listed
    deadline = time.monotonic() + 15
    r = guarded.registry(user, key)
    while r.request("GET", "").status_code != 200:
        assert time.monotonic() < deadline, "the robot is not let in"
        time.sleep(0.2)
    repo, i = unique("test/robot"), small_image()
    r.push_image(repo, "v1", i)
    r.check_image(repo, "v1", i)
    assert r.request("DELETE", "%s/manifests/v1" % repo).status_code == 403
    token = requests.get("http://%s/token?scope=repository:%s:pull" % (guarded.proxy, repo), auth=(user, key), timeout=10).json()["token"]
    guarded.command("robot", "revoke", "ci")
    deadline = time.monotonic() + 15
    bearer = {"Authorization": "Bearer " + token}
    while requests.get("http://%s/v2/%s/manifests/v1" % (guarded.proxy, repo), headers=bearer, timeout=10).status_code != 401:
        assert time.monotonic() < deadline, "the token outlives the robot"
        time.sleep(0.2)
    assert r.request("GET", "").status_code in (401, 503)
    assert guarded.command("robot", "revoke", "ci", check=False).returncode == 1


def test_check_access(guarded):
    assert "allowed: rule 1 allows pull to anonymous" in guarded.command("check-access", "anonymous", "public/a", "pull").stdout
    p = guarded.command("check-access", "eve", "test/a", "pull", check=False)
    assert p.returncode == 3 and "denied: no rule lets eve pull in test/a" in p.stdout
    assert guarded.command("check-access", "eve", "test/a", "write", check=False).returncode == 1


def test_no_secret_is_told(guarded):
    """Neither in logs nor in metrics, --check or the audit."""
    guarded.registry("ann", "guess-secret").request("GET", "")
    texts = [guarded.command("--check").stdout, open(guarded.path("audit.jsonl")).read()]
    for name in ("proxy-01", "agent-01", "build-index-01"):
        with open(os.path.join(guarded.dir, "c", "kraken-" + name, "log"), errors="replace") as f:
            texts.append(f.read())
        with open(os.path.join(guarded.dir, "c", "cluster.json")) as f:
            admin = next(c["admin"] for c in json.load(f)["components"] if c["name"] == "kraken-" + name)
        texts.append(requests.get("http://%s/metrics" % admin, timeout=10).text)
    for text in texts:
        for secret in ("ann-secret", "guess-secret", "krk_", "$2a$05", base64.b64encode(b"ann:ann-secret").decode(), "eyJhbGci"):
            assert secret not in text
