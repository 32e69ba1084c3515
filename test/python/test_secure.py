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

DEVCLUSTER = os.path.join(ROOT, "bin", "devcluster")


class Secure:
    def __init__(self):
        self.dir = tempfile.mkdtemp(prefix="kraken-secure-")
        run(DEVCLUSTER, "--dir", self.dir, "--bin", os.path.join(ROOT, "bin"), "up", "--free-ports", "--agents", 2, "--mutual-tls", "--login")
        with open(os.path.join(self.dir, "cluster.json")) as f:
            self.components = {c["name"]: c for c in json.load(f)["components"]}
        with open(os.path.join(self.dir, "password")) as f:
            self.admin = ("admin", f.read().strip())
        self.ca = os.path.join(self.dir, "tls", "ca.pem")

    def addr(self, name):
        return self.components["kraken-" + name]["addr"]

    def proxy(self):
        r = Registry(self.addr("proxy-01"), "https")
        r.s.verify, r.s.auth, r.s.trust_env = self.ca, self.admin, False  # the environment may name other authorities
        return r

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


def test_containerd_over_tls(secure, tmp_path):
    if not have("containerd"):
        skip("containerd is not installed: run test/setup.sh as root")
    if os.geteuid() != 0:
        skip("containerd needs root")
    repo, i, proxy = unique("test/ctr"), small_image(), secure.addr("proxy-01")
    secure.proxy().push_image(repo, "v1", i)
    ref = "%s/%s:v1" % (proxy, repo)
    os.makedirs(str(tmp_path / proxy))
    with open(str(tmp_path / proxy / "hosts.toml"), "w") as f:  # ctr's own flags take loopback for plain HTTP
        f.write('[host."https://%s"]\n  capabilities = ["pull", "resolve", "push"]\n  ca = "%s"\n' % (proxy, secure.ca))
    c, login = Containerd(proxy, secure.addr("agent-02")), ["--user", "%s:%s" % secure.admin]
    hosts = ["--hosts-dir", str(tmp_path)]
    try:
        assert c.ctr("images", "pull", *hosts, ref, check=False).returncode != 0
        c.ctr("images", "pull", *hosts, *login, ref)
        c.ctr("images", "tag", ref, ref.replace(":v1", ":v2"))
        c.ctr("images", "push", *hosts, *login, ref.replace(":v1", ":v2"))
        secure.proxy().check_image(repo, "v2", i)
        if os.path.exists(os.path.join(ROOT, "bin", "tools", "crictl")):
            c.crictl("pull", ref)  # by the agent, as hosts.toml says
    finally:
        c.end()


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
