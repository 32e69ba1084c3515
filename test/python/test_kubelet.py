"""A pod's service account instead of a pull secret: kubelet's own code runs kraken-credential-provider, and containerd pulls with what it gives, by an agent
that asks each caller."""

import base64
import json
import os
import re
import time

import pytest

from components import ROOT, run
from conftest import skip
from containerd import Containerd
from test_login import ANN, RULES, TOOLS, Guarded
from utils import have, small_image, unique

pytestmark = pytest.mark.plain("it has a cluster of its own, which asks who somebody is")

AUDIENCE, ISSUER = "kraken.example", "https://kubernetes.test"
KUBELET = os.path.join(TOOLS, "kubelet-credentials")


def base64url(b):
    return base64.urlsafe_b64encode(b).decode().rstrip("=")


class ServiceAccounts:
    """What a Kubernetes API server says of pods' service accounts: a key, and tokens that are signed with it."""

    def __init__(self, dir):
        self.key = os.path.join(dir, "sa.key")
        run("openssl", "genrsa", "-out", self.key, "2048")
        n = bytes.fromhex(run("openssl", "rsa", "-in", self.key, "-noout", "-modulus").stdout.strip().split("=")[1])
        self.jwks = os.path.join(dir, "jwks.json")
        with open(self.jwks, "w") as f:
            json.dump({"keys": [{"kty": "RSA", "alg": "RS256", "use": "sig", "kid": "1", "n": base64url(n), "e": "AQAB"}]}, f)

    def token(self, path, account, audience=AUDIENCE):
        now = int(time.time())
        claims = {"iss": ISSUER, "aud": [audience], "sub": "system:serviceaccount:" + account, "iat": now, "nbf": now, "exp": now + 600}
        signed = ".".join(base64url(json.dumps(part).encode()) for part in ({"alg": "RS256", "kid": "1", "typ": "JWT"}, claims))
        with open(path + ".signed", "w") as f:
            f.write(signed)
        run("openssl", "dgst", "-sha256", "-sign", self.key, "-out", path + ".sig", path + ".signed")
        with open(path + ".sig", "rb") as f, open(path, "w") as out:
            out.write(signed + "." + base64url(f.read()))
        return path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if not os.path.exists(KUBELET):
        skip("kubelet-credentials is not built: make test-tools")
    accounts = ServiceAccounts(str(tmp_path_factory.mktemp("accounts")))
    g = Guarded(issuers=[{"name": "k8s", "issuer": ISSUER, "audience": AUDIENCE, "keys": accounts.jwks}],
                rules=RULES + '  - {repositories: ["test/**"], subjects: ["k8s:system:serviceaccount:apps:web"], allow: [pull]}\n')
    g.accounts = accounts
    yield g
    g.end()


def kubelet(cluster, tmp_path, image, account, audience=AUDIENCE, check=True):
    """What kubelet gives the runtime for an image of a pod with this service account, as deploy/README.md sets it up."""
    with open(os.path.join(ROOT, "deploy", "README.md")) as f:
        config = re.search(r"```yaml\n(# kubelet:.*?)```", f.read(), re.S).group(1)
    assert "registry.example" in config and AUDIENCE in config
    path = str(tmp_path / "credentials.yaml")
    with open(path, "w") as f:
        f.write(config.replace("registry.example", cluster.proxy))
    token = cluster.accounts.token(str(tmp_path / "token"), account.replace("/", ":"), audience)
    p = run(KUBELET, "--image-credential-provider-config", path, "--image-credential-provider-bin-dir", os.path.join(ROOT, "bin"), "--audience", AUDIENCE,
            "--token", token, "--service-account", account, "--image", image, check=check)
    return json.loads(p.stdout.strip().splitlines()[-1]) if p.returncode == 0 else []


def test_kubelet_pulls_as_a_service_account(cluster, tmp_path):
    """The pod's service account gets its image through the agent; another one, or a token for somebody else, does not."""
    if not have("containerd"):
        skip("containerd is not installed: run test/setup.sh as root")
    if os.geteuid() != 0:
        skip("containerd needs root")
    repo, i = unique("test/sa"), small_image()
    cluster.registry(*ANN).push_image(repo, "v1", i)
    ref = "%s/%s:v1" % (cluster.proxy, repo)
    containerd = Containerd(cluster.proxy, cluster.agent)
    try:
        for account, audience, ok in (("apps/other", AUDIENCE, False), ("apps/web", "somebody.else", False), ("apps/web", AUDIENCE, True)):
            found = kubelet(cluster, tmp_path, ref, account, audience)
            assert [c["username"] for c in found] == ["oidc"], found
            p = containerd.crictl("pull", "--creds", "oidc:" + found[0]["password"], ref, check=False)
            assert (p.returncode == 0) == ok, "%s for %s: %s" % (account, audience, p.stdout)
    finally:
        containerd.end()
    assert kubelet(cluster, tmp_path, "docker.io/library/busybox", "apps/web", check=False) == []
