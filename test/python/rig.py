"""A cluster in network namespaces: every node has its own kernel counters and, where wanted, a shaped link.

bin/netns makes the namespaces, joined by a bridge that is itself in one, and bin/devcluster lays out and runs the cluster in them; nothing
of the machine's own network is touched, and everything is removed at the end. Needs root.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
import uuid

from components import ROOT, SECURE, run

NETNS, DEVCLUSTER = os.path.join(ROOT, "bin", "netns"), os.path.join(ROOT, "bin", "devcluster")


class Node:
    """A namespace, with the components that run in it."""

    def __init__(self, rig, name, ip, namespace):
        self.rig, self.name, self.ip, self.ns = rig, name, ip, namespace

    def exec(self, *args, **kw):
        return run("ip", "netns", "exec", self.ns, *args, **kw)

    def popen(self, args, **kw):
        return subprocess.Popen(["ip", "netns", "exec", self.ns] + [str(a) for a in args], **kw)

    def counter(self, which):
        """A counter of the node's link, from the kernel: rx_bytes, tx_packets and their like."""
        return int(self.exec("cat", "/sys/class/net/eth0/statistics/" + which).stdout)

    def payload(self):
        """Bytes of TCP payload that the node's link has received: what the kernel counted, less the headers of each frame, which may hold
        1448 bytes or, unsegmented between namespaces, 64 KiB: 14 of Ethernet, 20 of IPv4, 32 of TCP with time stamps (RFC 7323)."""
        return self.counter("rx_bytes") - 66 * self.counter("rx_packets")

    def shape(self, mbit):
        """Limits the link in both directions."""
        run(NETNS, "rate", self.rig.tag, mbit, self.name)

    def curl(self, url, *args, **kw):
        """curl in this node's namespace; --noproxy because the namespaces know no other network."""
        return self.exec("curl", "-sS", "--noproxy", "*", *args, url, **kw)

    def metrics(self):
        """Prometheus samples of the component of the node's name."""
        out = {}
        for line in self.curl("http://%s/metrics" % self.rig.component(self.name)["admin"]).stdout.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                out[name] = float(value)
        return out

    @property
    def addr(self):
        """Main listener of the component of the node's name."""
        return self.rig.component(self.name)["addr"]

    def kill(self):
        """kill -9 of the component of the node's name, as a crash would."""
        self.rig.control("kill", self.name)

    def start(self):
        """Starts it again and waits until it is ready."""
        self.rig.control("start", self.name)

    def log(self):
        with open(os.path.join(self.rig.dir, "kraken-" + self.name, "log"), errors="replace") as f:
            return f.read()


class Rig:
    """A cluster: each origin and agent has a node of its own, the core has the rest. others are nodes with nothing on them."""

    def __init__(self, agents=4, others=()):
        self.tag = "kr" + uuid.uuid4().hex[:4]
        self.dir = tempfile.mkdtemp(prefix="kraken-rig-")
        self.count, self.others = agents, others

    def __enter__(self):
        try:
            self._build()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exc):
        down = run(DEVCLUSTER, "--dir", self.dir, "down", check=False)
        run(NETNS, "down", self.tag, check=False)
        shutil.rmtree(self.dir, ignore_errors=True)
        assert down.returncode == 0, down.stdout

    def _build(self):
        origins = ["origin-%02d" % i for i in (1, 2, 3)]
        agents = ["agent-%02d" % i for i in range(1, self.count + 1)]
        hosts = json.loads(run(NETNS, "up", self.tag, "core", *origins, *agents, *self.others).stdout)
        self.nodes = {name: Node(self, name, h["ip"], h["namespace"]) for name, h in hosts.items()}
        self.core, self.origins, self.agents = self.nodes["core"], [self.nodes[o] for o in origins], [self.nodes[a] for a in agents]
        layout = {"hosts": {"kraken-" + name: hosts[name] for name in origins + agents}, "config": {"agent": {"small_blob": "1MiB"}}}
        layout["hosts"].update((role, hosts["core"]) for role in ("testfs", "tracker", "build-index", "proxy"))
        path = os.path.join(self.dir, "layout.json")
        with open(path, "w") as f:
            json.dump(layout, f)
        self.control("up", "--agents", self.count, "--layout", path, *(["--mutual-tls", "--login"] if SECURE else []))

    def control(self, *args):
        run(DEVCLUSTER, "--dir", self.dir, "--bin", os.path.join(ROOT, "bin"), *args)

    def component(self, name):
        """What devcluster says of a component."""
        with open(os.path.join(self.dir, "cluster.json")) as f:
            return next(c for c in json.load(f)["components"] if c["name"] == "kraken-" + name)

    def url(self, name):
        """Main listener of a component that is no agent."""
        return ("https://" if SECURE else "http://") + self.component(name)["addr"]

    def credentials(self, identity):
        """Flags of curl for these: the certificate of an identity, and the login of the proxy's user."""
        if not SECURE:
            return []
        tls = os.path.join(self.dir, "tls")
        with open(os.path.join(self.dir, "password")) as f:
            user = "admin:" + f.read().strip()
        return ["--cacert", tls + "/ca.pem", "--cert", "%s/%s.pem" % (tls, identity), "--key", "%s/%s.key" % (tls, identity), "-u", user]

    def push_blob(self, repo, path, digest):
        """Pushes a file through the proxy, with curl in the core's namespace."""
        base, who = self.url("proxy-01"), self.credentials("operator/operator")
        headers = self.core.curl(base + "/v2/%s/blobs/uploads/" % repo, *who, "-X", "POST", "-D", "-", "-o", "/dev/null").stdout
        loc = next(l.split(":", 1)[1].strip() for l in headers.splitlines() if l.lower().startswith("location:"))
        url = base + loc + ("&" if "?" in loc else "?") + "digest=" + digest
        code = self.core.curl(url, *who, "-X", "PUT", "-T", path, "-H", "Content-Type: application/octet-stream", "-o", "/dev/null", "-w", "%{http_code}").stdout
        assert code == "201", "push through the proxy: status %s" % code

    def await_metainfo(self, repo, digest, timeout=60):
        """Waits until there is metainfo, so that a pull swarms: the tracker has it in a torrent file, or, where there are none, an agent is given it."""
        deadline = time.monotonic() + timeout
        url, who = self.url("tracker-01") + "/blobs/%s/torrent" % digest, []
        if SECURE:
            url, who = self.url("origin-01") + "/v2/%s/_kraken/metainfo/%s" % (repo, digest), self.credentials("agent/agent-01")
        while self.core.curl(url, *who, "-o", "/dev/null", "-w", "%{http_code}").stdout != "200":
            assert time.monotonic() < deadline, "no metainfo after %d s" % timeout
            time.sleep(0.2)
