"""ID tokens of an issuer that is not ours, dex: a user logs in there, and pushes and pulls with what it gives; it goes away, and comes back with other keys."""

import os
import re
import socket
import subprocess
import time

import pytest
import requests

from components import ROOT, run
from conftest import skip
from test_login import Guarded, client_of, image  # noqa: F401, the fixture is used by name
from utils import Registry, small_image, unique

pytestmark = pytest.mark.plain("it has a cluster of its own, which asks who somebody is")

DEX = os.path.join(ROOT, "bin", "tools", "dex")
USER, PASSWORD = "tester@kraken.test", "ann-secret"
HASH = "$2a$10$UhK.zBhrFPnBiTX/S9JfzuH6lEOHYXCzXGzDdElPvR2/3xMlNucha"  # of the password
AUDIENCE, SECRET, BACK = "kraken-tests", "client-secret", "http://127.0.0.1/back"


class Dex:
    """A dex with one user. Each start of it has keys of its own."""

    def __init__(self):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.addr = "127.0.0.1:%d" % s.getsockname()[1]
        self.url = "http://%s/dex" % self.addr
        self.p = None

    def start(self):
        web = run("go", "list", "-m", "-f", "{{.Dir}}/web", "github.com/dexidp/dex", cwd=os.path.join(ROOT, "test", "tools", "dex")).stdout.strip()
        self.p = subprocess.Popen([DEX, "-issuer", self.url, "-listen", self.addr, "-web", web, "-client", AUDIENCE, "-secret", SECRET, "-redirect", BACK, "-email", USER, "-hash", HASH],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            try:
                if requests.get(self.url + "/.well-known/openid-configuration", timeout=2).ok:
                    return
            except requests.RequestException:
                pass
            assert self.p.poll() is None and time.monotonic() < deadline, "dex did not start"
            time.sleep(0.1)

    def stop(self):
        if self.p:
            self.p.terminate()
            self.p.wait(20)
        self.p = None

    def token(self):
        """What a browser does: the user's password at dex, a code back, and for that an ID token."""
        with requests.Session() as s:
            s.trust_env = False
            r = s.get(self.url + "/auth", params={"client_id": AUDIENCE, "redirect_uri": BACK, "response_type": "code", "scope": "openid email"}, timeout=10)
            r = s.post(r.url, data={"login": USER, "password": PASSWORD}, allow_redirects=False, timeout=10)
            while "code=" not in r.headers["Location"]:
                r = s.get(requests.compat.urljoin(r.url, r.headers["Location"]), allow_redirects=False, timeout=10)
            code = re.search(r"[?&]code=([^&]+)", r.headers["Location"]).group(1)
            r = s.post(self.url + "/token", data={"grant_type": "authorization_code", "code": code, "redirect_uri": BACK}, auth=(AUDIENCE, SECRET), timeout=10)
            assert r.status_code == 200, r.text
            return r.json()["id_token"]


@pytest.fixture(scope="module")
def dex():
    if not os.path.exists(DEX):
        skip("dex is not built: make test-tools")
    d = Dex()
    yield d
    d.stop()


@pytest.fixture(scope="module")
def guarded(dex):
    g = Guarded([{"name": "dex", "issuer": dex.url, "audience": AUDIENCE, "subject_claim": "email", "require": [{"claim": "email_verified", "value": "true"}]}])
    yield g
    g.end()


def status(guarded, token):
    """Of a request with an ID token as the password of the user oidc, and as a bearer, which are the same."""
    path = "test/issuer/manifests/none"
    got = Registry(guarded.proxy, auth=("oidc", token)).request("GET", path).status_code
    bearer = requests.get("http://%s/v2/%s" % (guarded.proxy, path), headers={"Authorization": "Bearer " + token}, timeout=30).status_code
    assert got == bearer
    return got


def test_keys_of_an_issuer(guarded, dex, image, tmp_path):  # noqa: F811
    dex.start()
    first = dex.token()
    dex.stop()
    assert status(guarded, first) == 503, "whether the token is right can't be known"
    assert requests.get("http://%s/token" % guarded.proxy, auth=("oidc", first), timeout=30).status_code == 503
    assert not [e for e in guarded.audit() if e["event"] == "login_failed"], "nobody failed to log in"

    dex.start()
    second = dex.token()
    await_status(guarded, second, 404)  # who may pull there is told that there is nothing
    assert status(guarded, first) == 401, "signed with a key that the issuer does not have any more"
    repo, i = unique("test/issuer"), small_image()
    r = Registry(guarded.proxy, auth=("oidc", second))
    r.push_image(repo, "v1", i)
    r.check_image(repo, "v1", i)
    assert r.request("DELETE", "%s/manifests/v1" % repo).status_code == 403
    assert {e["subject"] for e in guarded.audit() if e.get("repository") == repo} == {"dex:" + USER}
    head, claims, signature = second.split(".")
    for wrong in (".".join((head, claims, signature[:-4] + "AAAA")), ".".join((head, first.split(".")[1], signature))):
        assert status(guarded, wrong) == 401

    _, layout = image
    c = client_of("skopeo", str(tmp_path / "home"))
    c.login(guarded.proxy, "oidc", second)
    c.push(layout, "%s/%s:v2" % (guarded.proxy, repo))
    c.pull("%s/%s:v2" % (guarded.proxy, repo))

    dex.stop()
    assert status(guarded, second) == 404, "its keys were heard of"
    dex.start()
    third = dex.token()
    await_status(guarded, third, 404)
    assert status(guarded, second) == 401


def await_status(guarded, token, want):
    """An issuer is asked for its keys each 5 s at most."""
    deadline = time.monotonic() + 15
    while True:
        got = status(guarded, token)
        if got == want:
            return
        assert got in (401, 503) and time.monotonic() < deadline, got
        time.sleep(1)  # wrong tokens are told 30 times at once, and then slowed
