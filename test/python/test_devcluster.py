"""The dev cluster as a developer meets it: what runs can be looked at, a second one is refused, a stop drains, commands of the document work."""

import hashlib
import os
import threading
import time

import pytest
import requests

from components import DIR, ROOT, RUNTIME, Component, run
from utils import noise, sha256, unique

MIB = 1 << 20


def test_looking_at_components(cluster):
    """The commands of README.md's troubleshooting, in the runtime that they are for."""
    out = run("bin/devcluster", "--dir", DIR, "status", cwd=ROOT).stdout
    names = [c["name"] for c in cluster.state()["components"]]
    assert len(names) >= 9
    for name in names:
        line = next(line for line in out.splitlines() if line.startswith(name + " "))
        assert " ready " in line
    if RUNTIME == "docker":
        shown = run("bash", "-euo", "pipefail", "-c", "docker ps | grep kraken").stdout
        for name in names:
            assert name in shown
        assert "listening" in run("docker", "logs", "kraken-proxy-01").stdout
    else:
        assert "listening" in run("cat", os.path.join(DIR, "kraken-proxy-01", "log")).stdout


def test_taken_ports(cluster, tmp_path):
    """A cluster beside a running one names each taken port and who has it, starts nothing, and leaves the running one alone."""
    before = cluster.state()
    p = run("bin/devcluster", "--dir", tmp_path / "second", "up", cwd=ROOT, check=False)
    assert p.returncode != 0
    # Whose process it is can be known of one's own, and by root.
    mine = RUNTIME == "process" or os.geteuid() == 0
    for c in before["components"]:
        if c["role"] == "agent" and c["name"] > "kraken-agent-02":
            continue
        for addr in filter(None, (c["addr"], c.get("admin"), c.get("peer"))):
            line = next(line for line in p.stdout.splitlines() if addr + "," in line)
            assert "needed by " + c["name"] in line
            assert " is taken by process " in line and "(kraken" in line if mine else " is taken by " in line
    assert not (tmp_path / "second").exists()
    assert cluster.state() == before
    for c in before["components"]:
        assert Component(cluster, c["name"]).readiness().ok


@pytest.mark.skipif(RUNTIME != "docker", reason="containers only")
def test_leftover_container(cluster):
    """What a cluster that was cut off left behind makes room, whichever checkout it was of; a container of someone else's is named and stays."""
    me = cluster.agents[0]
    me.stop()
    run("docker", "create", "--name", me.name, "--label", "kraken.devcluster=/another/checkout", "kraken-agent:dev")
    me.start()
    me.stop()
    theirs = run("docker", "create", "--name", me.name, "kraken-agent:dev").stdout.strip()
    try:
        p = run("bin/devcluster", "--dir", DIR, "start", me.name, cwd=ROOT, check=False)
        assert p.returncode != 0
        assert "a container named %s exists" % me.name in p.stdout and "docker rm -f" in p.stdout
        assert run("docker", "ps", "-aq", "--no-trunc", "--filter", "name=" + me.name).stdout.strip() == theirs
    finally:
        run("docker", "rm", theirs)
        me.start()


def test_stop_drains(cluster, proxy, agent):
    """SIGTERM: readiness turns false at once, what is being read goes on to its end, and the next start has the blob."""
    repo, b = unique("test/drain"), noise(64 * MIB, "drain")
    proxy.push_blob(repo, b)
    me = cluster.agents[0]
    admin = "http://%s/readiness" % me.admin
    h = hashlib.sha256()
    with agent.blob(repo, sha256(b), stream=True) as r:
        parts = r.iter_content(MIB)
        h.update(next(parts))
        stopping = threading.Thread(target=me.stop)
        stopping.start()
        try:
            deadline = time.monotonic() + 10
            while True:
                ready = requests.get(admin, timeout=5)
                if ready.status_code == 503:
                    break
                assert time.monotonic() < deadline, "readiness did not turn false"
                time.sleep(0.05)
            assert ready.json()["status"] == "draining"
            for part in parts:
                h.update(part)
        finally:
            r.close()
            stopping.join()
    assert "sha256:" + h.hexdigest() == sha256(b)
    assert not me.running()
    me.start()
    before = me.metrics()
    assert agent.blob(repo, sha256(b)).content == b
    hits = "kraken_agent_blob_hits_total"
    assert me.metrics()[hits] == before.get(hits, 0) + 1
