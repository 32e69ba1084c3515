"""The secure cluster, as `make devcluster SECURE=1` makes it: each client logs in, pushes and pulls over TLS that it verifies, and pulls from an agent."""

import json
import os
import shutil
import tempfile

import pytest
import requests

from components import ROOT, run
from conftest import skip
from containerd import Containerd
from test_login import CLIENTS, client_of, image  # noqa: F401, the fixture is used by name
from utils import Registry, have, small_image, unique

pytestmark = pytest.mark.plain("it has a secure cluster of its own")

DEVCLUSTER, CRICTL = os.path.join(ROOT, "bin", "devcluster"), os.path.join(ROOT, "bin", "tools", "crictl")


class Secure:
    def __init__(self):
        self.dir = tempfile.mkdtemp(prefix="kraken-secure-")
        self.control("up", "--free-ports", "--agents", 2, "--mutual-tls", "--login")
        with open(os.path.join(self.dir, "cluster.json")) as f:
            self.components = {c["name"]: c for c in json.load(f)["components"]}
        with open(os.path.join(self.dir, "password")) as f:
            self.admin = ("admin", f.read().strip())
        self.ca = os.path.join(self.dir, "tls", "ca.pem")

        # The second agent asks each caller, and is told so once it is known where tokens are.
        path = os.path.join(self.dir, "kraken-agent-02", "config.yaml")
        access = {"rules": os.path.join(self.dir, "access.yaml"), "realm": "https://%s/token" % self.addr("proxy-01"), "modes": [{"repositories": "**", "mode": "caller"}]}
        self.control("stop", "kraken-agent-02")
        with open(path, "a") as f:
            f.write("\naccess: %s\n" % json.dumps(access))
        self.control("start", "kraken-agent-02")

    def control(self, *args):
        run(DEVCLUSTER, "--dir", self.dir, "--bin", os.path.join(ROOT, "bin"), *args)

    def addr(self, name):
        return self.components["kraken-" + name]["addr"]

    def proxy(self):
        return Registry(self.addr("proxy-01"), ca=self.ca, auth=self.admin)

    def log(self, name):
        with open(os.path.join(self.dir, "kraken-" + name, "log"), errors="replace") as f:
            return f.read()

    def end(self):
        run(DEVCLUSTER, "--dir", self.dir, "down", check=False)
        shutil.rmtree(self.dir, ignore_errors=True)


@pytest.fixture(scope="module")
def secure():
    s = Secure()
    yield s
    s.end()


@pytest.mark.parametrize("name", CLIENTS)
def test_client_over_tls(secure, image, tmp_path, name):  # noqa: F811
    i, layout = image
    repo, proxy, agent = unique("test/secure"), secure.addr("proxy-01"), secure.addr("agent-01")
    ref = "%s/%s:v1" % (proxy, repo)
    c = client_of(name, str(tmp_path / "home"), secure.ca)
    try:
        assert c.login(proxy, "admin", "wrong", check=False).returncode != 0
        assert c.pull(ref, check=False).returncode != 0
        c.login(proxy, *secure.admin)
        c.push(layout, ref)
        c.pull(ref)
    finally:
        c.end()
    if name in ("skopeo", "crane", "regctl", "oras"):  # the others make manifests of their own
        secure.proxy().check_image(repo, "v1", i)
    at_agent = client_of(name, str(tmp_path / "node"))  # loopback needs no TLS, and this cluster's agents no login
    try:
        at_agent.pull("%s/%s:v1" % (agent, repo))
    finally:
        at_agent.end()


@pytest.mark.parametrize("name", ["skopeo", "crane", "regctl", "oras", "podman", "buildah"])
def test_client_that_does_not_trust(secure, tmp_path, name):
    """TLS that nobody could verify is no protection: a client that trusts another authority goes no further."""
    c = client_of(name, str(tmp_path / "home"), "/dev/null")
    try:
        p = c.login(secure.addr("proxy-01"), *secure.admin, check=False)
        assert p.returncode != 0 and ("certificate" in p.stdout or "x509" in p.stdout), p.stdout
    finally:
        c.end()


@pytest.fixture
def containerd(secure):
    """containerd(agent) is one whose pulls of the proxy's name go to that agent."""
    if not have("containerd"):
        skip("containerd is not installed: run test/setup.sh as root")
    if os.geteuid() != 0:
        skip("containerd needs root")
    made = []

    def make(agent):
        made.append(Containerd(secure.addr("proxy-01"), secure.addr(agent), secure.ca))
        return made[-1]

    yield make
    for c in made:
        c.end()


def test_containerd_over_tls(secure, containerd):
    repo, i, proxy = unique("test/ctr"), small_image(), secure.addr("proxy-01")
    secure.proxy().push_image(repo, "v1", i)
    ref = "%s/%s:v1" % (proxy, repo)
    c = containerd("agent-01")
    assert c.ctr("images", "pull", *c.proxy(), ref, check=False).returncode != 0
    c.ctr("images", "pull", *c.proxy(secure.admin), ref)
    c.ctr("images", "tag", ref, ref.replace(":v1", ":v2"))
    c.ctr("images", "push", *c.proxy(secure.admin), ref.replace(":v1", ":v2"))
    secure.proxy().check_image(repo, "v2", i)
    if os.path.exists(CRICTL):
        c.crictl("pull", ref)  # by the agent, as hosts.toml says


def test_kubelet_with_a_pull_secret(secure, containerd):
    """By an agent that asks each caller, with a token that is fetched over TLS: who has no secret, or a wrong one, gets nothing."""
    if not os.path.exists(CRICTL):
        skip("crictl is not built: make test-tools")
    repo, i = unique("test/cri"), small_image()
    secure.proxy().push_image(repo, "v1", i)
    c, ref = containerd("agent-02"), "%s/%s:v1" % (secure.addr("proxy-01"), repo)
    for creds, ok in ((None, False), ("admin:wrong", False), (":".join(secure.admin), True)):
        p = c.crictl("pull", *(["--creds", creds] if creds else []), ref, check=False)
        assert (p.returncode == 0) == ok, "%s: %s" % (creds and creds.split(":")[0], p.stdout)


def test_only_its_own_may_ask(secure):
    """Between the parts nobody is let in without a certificate of the cluster, not even on this machine."""
    for name in ("origin-01", "build-index-01", "tracker-01"):
        with pytest.raises(requests.exceptions.RequestException):
            requests.get("https://%s/v2/" % secure.addr(name), verify=secure.ca, timeout=10)
    assert requests.get("https://%s/v2/" % secure.addr("proxy-01"), verify=secure.ca, timeout=10).status_code == 401


def test_zz_no_warnings(secure):
    """What the tests above did is every day's work: no part complains of another's certificate."""
    for name in secure.components:
        for line in secure.log(name[len("kraken-"):]).splitlines():
            assert not ("WARN" in line and ("certificate" in line or "identity" in line or "DENIED" in line)), "%s: %s" % (name, line)
