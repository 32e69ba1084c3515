"""The proxy as operators run it: behind nginx with TLS, and on a read-only filesystem with little memory."""

import glob
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from components import CA, ROOT, SECURE, run
from utils import Registry, file_of, noise, read_all, sha256, tar_of, unique

MIB = 1 << 20


behind_nginx = pytest.mark.plain("nginx is what has TLS, and the proxy behind it is plain")


@pytest.fixture
def nginx(tool, cluster):
    """nginx with its default buffering and time-outs terminates TLS in front of the proxy; yields its port."""
    tool("nginx", "openssl")
    d = tempfile.mkdtemp(prefix="kraken-nginx-")
    os.chmod(d, 0o755)  # nginx's workers are another user
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
        "-keyout", d + "/key.pem", "-out", d + "/cert.pem")
    port = 16099
    with open(d + "/nginx.conf", "w") as f:
        f.write("""daemon off; pid {0}/pid; error_log {0}/error.log; events {{}}
http {{
  access_log off;
  client_body_temp_path {0}/body; proxy_temp_path {0}/proxy; fastcgi_temp_path {0}/f; uwsgi_temp_path {0}/u; scgi_temp_path {0}/s;
  server {{
    listen 127.0.0.1:{1} ssl;
    ssl_certificate {0}/cert.pem; ssl_certificate_key {0}/key.pem;
    client_max_body_size 0;
    location / {{ proxy_pass http://{2}; proxy_set_header Host $http_host; proxy_set_header X-Forwarded-Proto https; }}
  }}
}}
""".format(d, port, cluster.proxy.addr))
    p = subprocess.Popen(["nginx", "-c", d + "/nginx.conf", "-p", d, "-e", d + "/start.log"])
    deadline = time.monotonic() + 15
    while True:
        try:
            requests.get("https://127.0.0.1:%d/v2/" % port, verify=d + "/cert.pem", timeout=2)
            break
        except requests.RequestException:
            assert p.poll() is None and time.monotonic() < deadline, "nginx does not answer"
            time.sleep(0.1)
    yield port, d + "/cert.pem"
    p.terminate()
    p.wait(20)
    shutil.rmtree(d, ignore_errors=True)


@behind_nginx
def test_docker_behind_nginx(docker, nginx, cluster, proxy):
    """docker push and pull through TLS; locations are relative, so nothing leads around nginx."""
    port, cert = nginx
    repo = unique("test/nginx")
    ref = "127.0.0.1:%d/%s:v1" % (port, repo)
    with tempfile.NamedTemporaryFile(suffix=".tar") as f:
        f.write(tar_of({"data": noise(20 * MIB, repo)}))
        f.flush()
        docker("import", f.name, ref)
    docker("push", ref)
    docker("rmi", "-f", ref)
    digest = proxy.manifest(repo, "v1").headers["Docker-Content-Digest"]
    assert digest in docker("pull", ref)
    docker("rmi", "-f", ref)
    r = requests.post("https://127.0.0.1:%d/v2/%s/blobs/uploads/" % (port, repo), verify=cert, timeout=10)
    assert r.status_code == 202 and r.headers["Location"].startswith("/v2/")


@behind_nginx
def test_chunked_push_behind_nginx(nginx, proxy):
    """A layer of a length that nobody names, in two chunks, out of order once; the algorithm of its digest is named at the end. Then it is read back, whole and in part."""
    port, cert = nginx
    base, repo, b = "https://127.0.0.1:%d/v2/" % port, unique("test/nginx-chunks"), noise(128 * MIB, "nginx")
    half, digest = 100 * MIB, "sha512:" + hashlib.sha512(b).hexdigest()

    def pieces(first, last):
        for at in range(first, last, MIB):
            yield b[at:min(at + MIB, last)]

    with requests.Session() as s:
        s.verify, s.trust_env = cert, False  # the environment may name other certificates, which would go first
        r = s.post(base + repo + "/blobs/uploads/", timeout=60)
        assert r.status_code == 202
        r = s.patch(requests.compat.urljoin(r.url, r.headers["Location"]), data=pieces(0, half), timeout=60)
        assert r.status_code == 202 and r.headers["Range"] == "0-%d" % (half - 1), r.text
        at = requests.compat.urljoin(r.url, r.headers["Location"])
        assert at.startswith(base)
        r = s.patch(at, data=b[:10], headers={"Content-Range": "0-9"}, timeout=60)
        assert r.status_code == 416 and r.headers["Range"] == "0-%d" % (half - 1)
        r = s.put(at, params={"digest": digest}, data=pieces(half, len(b)), timeout=60)
        assert r.status_code == 201, r.text
        blob = requests.compat.urljoin(r.url, r.headers["Location"])
        assert blob.startswith(base)
        assert s.get(blob, timeout=60).content == b
        r = s.get(blob, headers={"Range": "bytes=%d-" % (half + 5)}, timeout=60)
        assert r.status_code == 206 and r.content == b[half + 5:]
    proxy.request("DELETE", "%s/blobs/%s" % (repo, digest), want=202)


@behind_nginx
def test_slow_clients_behind_nginx(nginx, proxy):
    """A push and a pull that move all the time, and a push that pauses, each for longer than any of nginx's time-outs of 60 s."""
    port, cert = nginx
    base, repo, b, longer = "https://127.0.0.1:%d/v2/" % port, unique("test/nginx-slow"), noise(66 * MIB, "slow"), 66
    proxy.push_blob(repo, b)
    blobs = {k: noise(longer * 1024, repo + k) for k in ("steady", "pause")}

    def session():
        s = requests.Session()
        s.verify, s.trust_env = cert, False
        return s

    def steadily(data):
        for i in range(longer):
            yield data[i * 1024:(i + 1) * 1024]
            time.sleep(1)

    def finish(s, r, data):
        assert r.status_code == 202, r.text
        r = s.put(requests.compat.urljoin(r.url, r.headers["Location"]), params={"digest": sha256(data)}, timeout=60)
        assert r.status_code == 201, r.text

    def steady():
        with session() as s:
            r = s.post(base + repo + "/blobs/uploads/", timeout=60)
            finish(s, s.patch(requests.compat.urljoin(r.url, r.headers["Location"]), data=steadily(blobs["steady"]), timeout=60), blobs["steady"])

    def pause():
        data = blobs["pause"]
        with session() as s:
            r = s.post(base + repo + "/blobs/uploads/", timeout=60)
            r = s.patch(requests.compat.urljoin(r.url, r.headers["Location"]), data=data[:100], timeout=60)
            time.sleep(longer)
            finish(s, s.patch(requests.compat.urljoin(r.url, r.headers["Location"]), data=data[100:], timeout=60), data)

    def pull():
        h, took = hashlib.sha256(), time.monotonic()
        with session() as s, s.get(base + repo + "/blobs/" + sha256(b), stream=True, timeout=60) as r:
            assert r.status_code == 200
            for part in r.iter_content(MIB):
                h.update(part)
                time.sleep(1)
        assert time.monotonic() - took > 60 and "sha256:" + h.hexdigest() == sha256(b)

    with ThreadPoolExecutor(3) as pool:
        for f in [pool.submit(f) for f in (steady, pause, pull)]:
            f.result()
    for data in blobs.values():
        assert proxy.blob(repo, sha256(data)).content == data


def test_cut_through(tool, cluster, tmp_path):
    """4 GiB, or a part of it over TLS, go through a proxy on a read-only filesystem with a 64 MiB memory limit."""
    if os.geteuid() != 0 or not os.path.isdir("/sys/fs/cgroup"):
        from conftest import skip
        skip("a memory limit and a read-only filesystem need root and cgroups")
    size = 512 * MIB if SECURE else 4 << 30
    path = str(tmp_path / "blob")
    digest = file_of(path, size, seed=4)
    with confined_proxy(cluster) as (front, peak):
        repo = unique("test/cut-through")
        with open(path, "rb") as f:
            r = front.request("POST", "%s/blobs/uploads/" % repo, want=202)
            r = front.s.put(front.location(r), params={"digest": digest}, data=f, timeout=600)
        assert r.status_code == 201, r.text
        os.unlink(path)
        with front.blob(repo, digest, stream=True) as r:
            assert read_all(r) == (digest, size)
        print("peak memory of the proxy's group: %.1f MiB" % (peak() / MIB))
        assert peak() <= 64 * MIB
    cluster.wait_written_back(300)
    for o in cluster.origins:  # 12 GiB in all; the proxy's delete would only end the membership
        o.registry("operator/operator").request("DELETE", "%s/blobs/%s" % (repo, digest))
    for f in glob.glob("%s/**/%s/data" % (cluster.bucket.state_dir, digest[7:]), recursive=True):
        os.unlink(f)


class confined_proxy:
    """A second proxy whose whole filesystem is read-only and whose control group has 64 MiB."""

    def __init__(self, cluster):
        self.cluster = cluster

    def __enter__(self):
        self.v2 = os.path.exists("/sys/fs/cgroup/cgroup.controllers")
        self.group = "/sys/fs/cgroup/%skraken-cut-through-%d" % ("" if self.v2 else "memory/", os.getpid())
        os.mkdir(self.group)
        self._write("memory.max" if self.v2 else "memory.limit_in_bytes", str(64 * MIB))
        self.dir = tempfile.mkdtemp(prefix="kraken-ro-")
        src = os.path.join(os.environ.get("KRAKEN_DEVCLUSTER_DIR", os.path.join(ROOT, ".devcluster")), "kraken-proxy-01", "config.yaml")
        with open(src) as f:
            text = f.read().replace(":16000", ":16098", 1)
        text = text.replace(self.cluster.proxy.admin, "127.0.0.1:16097")
        conf = self.dir + "/config.yaml"
        with open(conf, "w") as f:
            f.write(text)
        self.log = open(self.dir + "/log", "w")
        # The shell joins the group, makes its own mount namespace read-only, and becomes the proxy.
        script = 'echo $$ > %s/cgroup.procs && mount --make-rprivate / && mount -o remount,bind,ro / && exec "$@"' % self.group
        self.p = subprocess.Popen(["unshare", "-m", "sh", "-c", script, "sh", os.path.join(ROOT, "bin", "kraken-proxy"), "--config", conf], stdout=self.log, stderr=self.log)
        addr, deadline = "127.0.0.1:16098", time.monotonic() + 20
        while True:
            try:
                if requests.get("http://127.0.0.1:16097/readiness", timeout=2).ok:
                    return Registry(addr, ca=CA, auth=self.cluster.login()) if SECURE else Registry(addr), self._peak
            except requests.RequestException:
                pass
            if self.p.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise AssertionError("the confined proxy did not start: " + open(self.dir + "/log").read())
            time.sleep(0.1)

    def _write(self, name, value):
        with open(os.path.join(self.group, name), "w") as f:
            f.write(value)

    def _peak(self):
        with open(os.path.join(self.group, "memory.peak" if self.v2 else "memory.max_usage_in_bytes")) as f:
            return int(f.read())

    def __exit__(self, *exc):
        if self.p.poll() is None:
            self.p.terminate()
        self.p.wait(40)
        self.log.close()
        os.rmdir(self.group)
        shutil.rmtree(self.dir, ignore_errors=True)
