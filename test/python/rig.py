"""A cluster in network namespaces: every node has its own kernel counters and, where wanted, a shaped link.

Nodes are namespaces joined by a bridge that is itself in a namespace; nothing of the machine's own network is touched, and
everything is removed at the end. Needs root.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
import uuid

from components import ROOT, run

NET = "10.213.7."


class Node:
    def __init__(self, rig, name, host):
        self.rig, self.name, self.ip = rig, name, NET + str(host)
        self.ns = "%s-%s" % (rig.tag, name)
        self.procs = {}

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

    def shape(self, rate):
        """Limits the link in both directions, e.g. "25mbit"."""
        for ns, dev in ((self.ns, "eth0"), (self.rig.hub, "v-" + self.name)):
            run("ip", "netns", "exec", ns, "tc", "qdisc", "replace", "dev", dev, "root", "tbf", "rate", rate, "burst", "64kb", "latency", "100ms")

    def start(self, role, config, args=()):
        folder = os.path.join(self.rig.dir, self.name, role)
        os.makedirs(folder, exist_ok=True)
        argv = [os.path.join(ROOT, "bin", "kraken-" + role)]
        if config is not None:
            path = os.path.join(folder, "config.yaml")
            with open(path, "w") as f:
                json.dump(config, f)  # JSON is YAML
            argv += ["--config", path]
        log = open(os.path.join(folder, "log"), "a")
        self.procs[role] = self.popen(argv + list(args), stdout=log, stderr=log)
        log.close()

    def kill(self, role):
        """kill -9, as a crash would."""
        p = self.procs.pop(role)
        p.kill()
        p.wait()

    def log(self, role):
        with open(os.path.join(self.rig.dir, self.name, role, "log"), errors="replace") as f:
            return f.read()

    def curl(self, url, *args, **kw):
        """curl in this node's namespace; --noproxy because the namespaces know no other network."""
        return self.exec("curl", "-sS", "--noproxy", "*", *args, url, **kw)

    def metrics(self, port):
        out = {}
        for line in self.curl("http://%s:%d/metrics" % (self.ip, port)).stdout.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                out[name] = float(value)
        return out


class Rig:
    def __init__(self, agents=4, small_blob="1MiB"):
        self.tag = "kr" + uuid.uuid4().hex[:4]
        self.hub = self.tag + "-hub"
        self.dir = tempfile.mkdtemp(prefix="kraken-rig-")
        self.small_blob = small_blob
        self.nodes, self.count = [], agents

    def __enter__(self):
        try:
            self._build()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exc):
        for n in self.nodes:
            for p in n.procs.values():
                p.terminate()
        for n in self.nodes:
            for p in n.procs.values():
                try:
                    p.wait(40)
                except subprocess.TimeoutExpired:
                    p.kill()
                    p.wait()
        for ns in [n.ns for n in self.nodes] + [self.hub]:
            run("ip", "netns", "del", ns, check=False)
        shutil.rmtree(self.dir, ignore_errors=True)

    def _node(self, name, host):
        n = Node(self, name, host)
        self.nodes.append(n)
        run("ip", "netns", "add", n.ns)
        run("ip", "link", "add", "eth0", "netns", n.ns, "type", "veth", "peer", "name", "v-" + name, "netns", self.hub)
        run("ip", "-n", self.hub, "link", "set", "v-" + name, "master", "br0", "up")
        run("ip", "-n", n.ns, "addr", "add", n.ip + "/24", "dev", "eth0")
        run("ip", "-n", n.ns, "link", "set", "eth0", "up")
        run("ip", "-n", n.ns, "link", "set", "lo", "up")
        return n

    def _build(self):
        run("ip", "netns", "add", self.hub)
        run("ip", "-n", self.hub, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", self.hub, "link", "set", "br0", "up")
        self.core = self._node("core", 10)
        self.origins = [self._node("origin%d" % i, 20 + i) for i in (1, 2, 3)]
        self.agents = [self._node("agent%d" % i, 30 + i) for i in range(1, self.count + 1)]
        core = self.core.ip
        members = [{"id": "origin-%02d" % (i + 1), "url": "http://%s:16031" % o.ip, "peer": "%s:16041" % o.ip} for i, o in enumerate(self.origins)]
        base = {"log": {"format": "text", "level": "info"}, "origins": members, "replicas": 2}
        bucket = [{"name": "rig", "url": "s3://kraken?endpoint=http://%s:16050&region=us-east-1&use_path_style=true" % core, "access_key": "kraken", "secret_key": "kraken"}]

        def state(n, role):
            d = os.path.join(self.dir, n.name, role + "-state")
            os.makedirs(d)
            return d

        def listens(n, port, admin):
            return {"server": {"listen": "%s:%d" % (n.ip, port)}, "admin": {"listen": "%s:%d" % (n.ip, admin)}}

        self.core.start("testfs", None, ["--listen", core + ":16050", "--dir", state(self.core, "testfs")])
        self.await_ready(self.core, 16050)
        for o, m in zip(self.origins, members):
            o.start("origin", {**base, **listens(o, 16031, 16034), "id": m["id"], "dir": state(o, "origin"), "buckets": bucket,
                               "peer": {"listen": o.ip + ":16041", "stock_peers": True}})
        self.core.start("tracker", {**base, **listens(self.core, 16020, 16021), "stock_peers": True})
        self.core.start("build-index", {**base, **listens(self.core, 16010, 16011), "database": os.path.join(state(self.core, "build-index"), "names.db"), "buckets": bucket})
        for o in self.origins:
            self.await_ready(o, 16031)
        self.await_ready(self.core, 16020)
        self.await_ready(self.core, 16010)
        self.core.start("proxy", {**base, **listens(self.core, 16000, 16001), "build_index": {"url": "http://%s:16010" % core}})
        self.await_ready(self.core, 16000)
        self.agent_config = lambda n: {
            **base, **listens(n, 16061, 16063), "node": n.name, "build_index": {"url": "http://%s:16010" % core}, "tracker": {"url": "http://%s:16020" % core},
            "peer": {"listen": n.ip + ":16062", "stock_peers": True}, "cache": {"dir": os.path.join(self.dir, n.name, "agent-state")}, "small_blob": self.small_blob}
        for a in self.agents:
            self.start_agent(a)

    def start_agent(self, a):
        os.makedirs(os.path.join(self.dir, a.name, "agent-state"), exist_ok=True)
        a.start("agent", self.agent_config(a))
        self.await_ready(a, 16061)

    def await_ready(self, n, port, timeout=30):
        deadline = time.monotonic() + timeout
        while True:
            r = n.curl("http://%s:%d/readiness" % (n.ip, port), "-o", "/dev/null", "-w", "%{http_code}", check=False)
            if r.stdout.strip().endswith("200"):
                return
            if time.monotonic() > deadline:
                logs = "\n".join("%s: %s" % (role, n.log(role)[-1500:]) for role in n.procs)
                raise AssertionError("%s:%d is not ready after %d s\n%s" % (n.name, port, timeout, logs))
            time.sleep(0.1)

    def push_blob(self, repo, path, digest):
        """Pushes a file through the proxy, with curl in the core's namespace."""
        base = "http://%s:16000" % self.core.ip
        headers = self.core.curl(base + "/v2/%s/blobs/uploads/" % repo, "-X", "POST", "-D", "-", "-o", "/dev/null").stdout
        loc = next(l.split(":", 1)[1].strip() for l in headers.splitlines() if l.lower().startswith("location:"))
        url = base + loc + ("&" if "?" in loc else "?") + "digest=" + digest
        code = self.core.curl(url, "-X", "PUT", "-T", path, "-H", "Content-Type: application/octet-stream", "-o", "/dev/null", "-w", "%{http_code}").stdout
        assert code == "201", "push through the proxy: status %s" % code

    def await_metainfo(self, repo, digest, timeout=60):
        """Waits until the tracker can answer with metainfo, so that a pull swarms."""
        deadline = time.monotonic() + timeout
        url = "http://%s:16020/blobs/%s/torrent" % (self.core.ip, digest)
        while self.core.curl(url, "-o", "/dev/null", "-w", "%{http_code}").stdout != "200":
            assert time.monotonic() < deadline, "no metainfo after %d s" % timeout
            time.sleep(0.2)
