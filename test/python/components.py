"""The dev cluster's components as Python objects: start, stop, kill and wipe them by name."""

import json
import os
import subprocess
import time

import requests

from utils import Registry

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
DIR = os.environ.get("KRAKEN_DEVCLUSTER_DIR", os.path.join(ROOT, ".devcluster"))
RUNTIME = os.environ.get("RUNTIME", "process")
SECURE = os.environ.get("SECURE", "") not in ("", "0")  # the cluster of `make devcluster SECURE=1`: TLS, certificates between the parts, a login
CA = os.path.join(DIR, "tls", "ca.pem")  # of a secure cluster


def run(*args, check=True, timeout=300, **kw):
    """Runs a program, captures what it prints and shows it when it fails."""
    p = subprocess.run([str(a) for a in args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, **kw)
    if check and p.returncode != 0:
        raise AssertionError("%s\nexit code %d:\n%s" % (" ".join(map(str, args)), p.returncode, p.stdout))
    return p


class Component:
    """One process or container of the dev cluster."""

    def __init__(self, cluster, name):
        self.cluster, self.name = cluster, name

    @property
    def _state(self):
        return next(c for c in self.cluster.state()["components"] if c["name"] == self.name)

    @property
    def addr(self):
        return self._state["addr"]

    @property
    def admin(self):
        return self._state.get("admin")

    @property
    def peer(self):
        return self._state.get("peer")

    @property
    def pid(self):
        """Process id, in the process runtime."""
        return int(self._state["handle"].split(":")[0])

    @property
    def scheme(self):
        """Of the main listener: agents serve their node's loopback, and the bucket is not Kraken's."""
        return "https" if SECURE and self._state["role"] not in ("agent", "testfs") else "http"

    @property
    def url(self):
        return "%s://%s" % (self.scheme, self.addr)

    def registry(self, identity="proxy/proxy-01"):
        """The main listener as a registry. In a secure cluster the proxy is spoken to as its user, and other parts with the certificate of an identity."""
        if self.scheme == "http":
            return Registry(self.addr)
        if self._state["role"] == "proxy":
            return Registry(self.addr, ca=CA, auth=self.cluster.login())
        return Registry(self.addr, ca=CA, cert=[os.path.join(DIR, "tls", identity + kind) for kind in (".pem", ".key")])

    def readiness(self):
        """Where that is asked: a secure cluster's main listeners ask who comes first."""
        return requests.get("http://%s/readiness" % (self.admin if SECURE and self.admin else self.addr), timeout=5)

    @property
    def state_dir(self):
        return os.path.join(DIR, self.name, "state-" + RUNTIME)

    def stop(self):
        self.cluster.control("stop", self.name)

    def kill(self):
        self.cluster.control("kill", self.name)

    def start(self):
        self.cluster.control("start", self.name)

    def restart(self, wipe=False):
        self.stop()
        if wipe:
            self.wipe()
        self.start()

    def wipe(self):
        self.cluster.control("wipe", self.name)

    def running(self):
        return bool(self._state.get("handle"))

    def metrics(self):
        """Prometheus samples of this component: name (with labels) to value."""
        out = {}
        for line in requests.get("http://%s/metrics" % self.admin, timeout=10).text.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                out[name] = float(value)
        return out

    def log(self):
        if RUNTIME == "docker":
            return run("docker", "logs", self.name).stdout
        with open(os.path.join(DIR, self.name, "log"), errors="replace") as f:
            return f.read()


class Cluster:
    """The dev cluster as a whole. It reuses a running one, else starts one and ends it afterwards."""

    def __init__(self, agents=2):
        self.agents_wanted, self.started = agents, False

    def state(self):
        with open(os.path.join(DIR, "cluster.json")) as f:
            return json.load(f)

    def control(self, *args):
        run(os.path.join(ROOT, "bin", "devcluster"), "--dir", DIR, *args, cwd=ROOT)

    def login(self):
        """User and password of a secure cluster, None of a plain one."""
        if not SECURE:
            return None
        with open(os.path.join(DIR, "password")) as f:
            return "admin", f.read().strip()

    def make(self, *args):
        run("make", "STATE=" + DIR, *args, cwd=ROOT, timeout=900)

    def _usable(self):
        try:
            state = self.state()
        except FileNotFoundError:
            return False
        if state["runtime"] != RUNTIME or state.get("login", False) != SECURE or len([c for c in state["components"] if c["role"] == "agent"]) < self.agents_wanted:
            return False
        try:
            return all(Component(self, c["name"]).readiness().ok for c in state["components"])
        except requests.RequestException:
            return False

    def ensure(self):
        if self._usable():
            return
        if os.path.exists(os.path.join(DIR, "cluster.json")):
            self.make("stop-devcluster")
        self.make("devcluster", "RUNTIME=" + RUNTIME, "AGENTS=%d" % self.agents_wanted, "SECURE=%d" % SECURE)
        self.started = True

    def end(self):
        if self.started and os.path.exists(os.path.join(DIR, "cluster.json")):
            self.make("stop-devcluster")
        self.started = False

    def revive(self):
        """Starts whatever a test left stopped."""
        for c in self.state()["components"]:
            if not c.get("handle"):
                self.control("start", c["name"])

    def __getitem__(self, name):
        return Component(self, "kraken-" + name)

    @property
    def proxy(self):
        return self["proxy-01"]

    @property
    def tracker(self):
        return self["tracker-01"]

    @property
    def build_index(self):
        return self["build-index-01"]

    @property
    def bucket(self):
        return self["testfs-01"]

    @property
    def origins(self):
        return [Component(self, c["name"]) for c in self.state()["components"] if c["role"] == "origin"]

    @property
    def agents(self):
        return [Component(self, c["name"]) for c in self.state()["components"] if c["role"] == "agent"]

    def wait_written_back(self, timeout=60):
        """Waits until no component has anything left to write to the bucket."""
        deadline = time.monotonic() + timeout
        while True:
            left = {}
            for c in self.origins + [self.build_index]:
                s = requests.get("http://%s/writeback" % c.admin, timeout=5).json()
                if s["pending"] or s["names"]:
                    left[c.name] = s
            if not left:
                return
            if time.monotonic() > deadline:
                raise AssertionError("not written back after %d s: %s" % (timeout, left))
            time.sleep(0.2)
