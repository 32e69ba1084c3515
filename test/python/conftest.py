"""Fixtures: the dev cluster and its parts."""

import os

import pytest

from components import Cluster, run
from utils import Registry, have

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


@pytest.fixture(scope="session")
def _cluster():
    c = Cluster(agents=int(os.environ.get("AGENTS", "2")))
    c.ensure()
    yield c
    c.end()


@pytest.fixture
def cluster(_cluster):
    """The dev cluster, with every component running before and after the test."""
    _cluster.revive()
    yield _cluster
    _cluster.revive()


@pytest.fixture
def proxy(cluster):
    return Registry(cluster.proxy.addr)


@pytest.fixture
def agents(cluster):
    return [Registry(a.addr) for a in cluster.agents]


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
