"""A containerd of the tests' own."""

import os
import shutil
import subprocess
import tempfile
import time

from components import ROOT, run


class Containerd:
    """A containerd of this test's own, with the CRI plugin and a hosts.toml that sends the proxy's name to an agent. With ca, a file, the proxy has TLS."""

    def __init__(self, mirrored, agent, ca=None):
        self.dir = tempfile.mkdtemp(prefix="kc", dir="/tmp")
        self.sock = self.dir + "/c.sock"
        hosts = "%s/certs.d/%s" % (self.dir, mirrored)
        os.makedirs(hosts)
        with open(hosts + "/hosts.toml", "w") as f:
            f.write('server = "http://%s"\n[host."http://%s"]\n  capabilities = ["pull", "resolve"]\n' % (agent, agent))
            if ca:  # for the tokens that the agent asks for
                f.write('  ca = "%s"\n' % ca)
        self.hosts = ca and self.dir + "/hosts"
        if ca:
            os.makedirs(self.hosts + "/" + mirrored)
            with open("%s/%s/hosts.toml" % (self.hosts, mirrored), "w") as f:
                f.write('[host."https://%s"]\n  capabilities = ["pull", "resolve", "push"]\n  ca = "%s"\n' % (mirrored, ca))
        with open(self.dir + "/config.toml", "w") as f:
            f.write("""version = 2
root = "{0}/root"
state = "{0}/state"
[grpc]
  address = "{0}/c.sock"
[plugins."io.containerd.grpc.v1.cri"]
  disable_tcp_service = true
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{0}/certs.d"
""".format(self.dir))
        self.log = open(self.dir + "/log", "w")
        self.p = subprocess.Popen(["containerd", "--config", self.dir + "/config.toml"], stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + 30
        while self.ctr("version", check=False).returncode != 0:
            if time.monotonic() > deadline or self.p.poll() is not None:
                with open(self.dir + "/log") as f:
                    raise AssertionError("containerd did not start:\n" + f.read()[-3000:])
            time.sleep(0.1)

    def proxy(self, login=None):
        """Flags of ctr for what goes to the proxy itself; login is user and password. With its other flags ctr takes loopback for plain HTTP."""
        return (["--hosts-dir", self.hosts] if self.hosts else ["--plain-http"]) + (["--user", "%s:%s" % login] if login else [])

    def ctr(self, *args, **kw):
        return run("ctr", "-a", self.sock, *args, **kw)

    def crictl(self, *args, **kw):
        return run(os.path.join(ROOT, "bin", "tools", "crictl"), "--runtime-endpoint", "unix://" + self.sock, "--image-endpoint", "unix://" + self.sock, "--timeout", "120s", *args, **kw)

    def end(self):
        self.p.terminate()
        self.p.wait(30)
        self.log.close()
        shutil.rmtree(self.dir, ignore_errors=True)
