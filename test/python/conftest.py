"""Fixtures: the dev cluster and its parts."""

import base64
import json
import os

import pytest

from components import CA, SECURE, Cluster, run
from utils import have

REQUIRE = os.environ.get("KRAKEN_TEST_REQUIRE") == "1"


def skip(reason):
    """Skips, or fails where skipping is not allowed."""
    if REQUIRE:
        pytest.fail("KRAKEN_TEST_REQUIRE=1, but: " + reason)
    pytest.skip(reason)


TABLES = []  # what tests have to show beyond passed and failed


def pytest_terminal_summary(terminalreporter):
    for text in TABLES:
        terminalreporter.write_line("\n" + text)


def pytest_configure(config):
    config.addinivalue_line("markers", "plain(reason): not run with SECURE=1, and why")


def pytest_collection_modifyitems(items):
    for item in items:
        mark = item.get_closest_marker("plain")
        if mark and SECURE:
            item.add_marker(pytest.mark.skip(reason="without SECURE=1 only: " + mark.args[0]))


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory):
    c = Cluster(agents=int(os.environ.get("AGENTS", "2")))
    c.ensure()
    with pytest.MonkeyPatch.context() as env:
        if SECURE:
            logged_in(c, str(tmp_path_factory.mktemp("login")), env)
        yield c
    c.end()


def logged_in(cluster, folder, env):
    """Gives every client that a test runs what its user has in a secure cluster: a login at the proxy, and its authority."""
    login = base64.b64encode(":".join(cluster.login()).encode()).decode()
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump({"auths": {cluster.proxy.addr: {"auth": login}}}, f)
    env.setenv("DOCKER_CONFIG", folder)
    env.setenv("REGISTRY_AUTH_FILE", os.path.join(folder, "config.json"))
    env.setenv("SSL_CERT_FILE", CA)


@pytest.fixture
def cluster(_cluster):
    """The dev cluster, with every component running before and after the test."""
    _cluster.revive()
    yield _cluster
    _cluster.revive()


@pytest.fixture
def proxy(cluster):
    return cluster.proxy.registry()


@pytest.fixture
def agents(cluster):
    return [a.registry() for a in cluster.agents]


@pytest.fixture
def agent(agents):
    return agents[0]


@pytest.fixture
def tool():
    """tool("skopeo") skips the test when the program is missing."""

    def need(*names):
        for n in names:
            if not have(n):
                skip("%s is not installed: run test/setup.sh as root" % n)

    return need


@pytest.fixture
def docker(tool):
    """A docker command against a running daemon."""
    tool("docker")
    if run("docker", "info", check=False).returncode != 0:
        skip("no docker daemon answers: start dockerd, or run test/setup.sh as root")

    def command(*args, **kw):
        return run("docker", *args, **kw).stdout

    return command
