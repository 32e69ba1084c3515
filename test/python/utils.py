"""Images made from nothing, and the registry API spoken by hand."""

import gzip
import hashlib
import http.client
import io
import json
import os
import random
import ssl
import subprocess
import tarfile
import uuid

import requests

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
OCI_LAYER_PLAIN = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"

ACCEPT = ", ".join([OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST])


def sha256(b):
    return "sha256:" + hashlib.sha256(b).hexdigest()


def unique(prefix):
    """A repository name that no other test uses."""
    return "%s/%s" % (prefix, uuid.uuid4().hex[:12])


def noise(size, seed):
    """Bytes that don't compress, the same for the same seed."""
    r, block = random.Random(seed), 4 << 20
    return b"".join(r.randbytes(min(block, size - at)) for at in range(0, size, block))


def tar_of(files):
    """A tar archive with fixed times, so that its digest is stable. files: name to bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as t:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
    return out.getvalue()


class Image:
    """An image in memory: layers, config, manifest. docker=True uses Docker schema 2 media types; compress="zstd" needs the program."""

    def __init__(self, layers, docker=False, architecture="amd64", compress=True, media_type=True):
        self.blobs, descriptors, diff_ids = {}, [], []
        for files in layers:
            plain = tar_of(files)
            diff_ids.append(sha256(plain))
            if compress == "zstd":
                packed, kind = subprocess.run(["zstd", "-q", "-1"], input=plain, stdout=subprocess.PIPE, check=True).stdout, OCI_LAYER_ZSTD
            elif compress:
                packed, kind = gzip.compress(plain, compresslevel=1, mtime=0), DOCKER_LAYER if docker else OCI_LAYER
            else:
                packed, kind = plain, DOCKER_LAYER if docker else OCI_LAYER_PLAIN
            descriptors.append(self._add(packed, kind))
        config = json.dumps({
            "architecture": architecture, "os": "linux", "config": {"Cmd": ["/hello"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }).encode()
        self.media_type = DOCKER_MANIFEST if docker else OCI_MANIFEST
        doc = {"schemaVersion": 2, "mediaType": self.media_type, "config": self._add(config, DOCKER_CONFIG if docker else OCI_CONFIG), "layers": descriptors}
        if not media_type:
            del doc["mediaType"]
        self.manifest = json.dumps(doc).encode()
        self.digest = sha256(self.manifest)
        self.layers = [d["digest"] for d in descriptors]
        self.platform = {"architecture": architecture, "os": "linux"}

    def _add(self, b, media_type):
        d = sha256(b)
        self.blobs[d] = b
        return {"mediaType": media_type, "digest": d, "size": len(b)}

    def descriptor(self):
        return {"mediaType": self.media_type, "digest": self.digest, "size": len(self.manifest), "platform": self.platform}


def small_image(seed=None, **kw):
    seed = seed or uuid.uuid4().hex
    return Image([{"hello": b"#!/bin/sh\necho " + seed.encode() + b"\n"}, {"data": noise(200_000, seed)}], **kw)


def index_of(images, docker=False):
    kind = DOCKER_LIST if docker else OCI_INDEX
    return kind, json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": [i.descriptor() for i in images]}).encode()


def write_oci_layout(folder, descriptor, blobs):
    """An OCI image layout of one manifest, called v1. blobs: digest to bytes, manifests as well."""
    os.makedirs(os.path.join(folder, "blobs", "sha256"))
    for d, b in blobs.items():
        with open(os.path.join(folder, "blobs", "sha256", d.split(":")[1]), "wb") as f:
            f.write(b)
    with open(os.path.join(folder, "oci-layout"), "w") as f:
        json.dump({"imageLayoutVersion": "1.0.0"}, f)
    with open(os.path.join(folder, "index.json"), "w") as f:
        json.dump({"schemaVersion": 2, "manifests": [dict(descriptor, annotations={"org.opencontainers.image.ref.name": "v1"})]}, f)


class Registry:
    """One registry endpoint. Every method asserts the status it needs. With ca, a file, it speaks TLS; auth is user and password, cert the files of a
    certificate and its key."""

    def __init__(self, addr, ca=None, auth=None, cert=None):
        self.base = "%s://%s/v2/" % ("https" if ca else "http", addr)
        self.s = requests.Session()
        self.s.auth, self.s.cert = auth, cert
        if ca:
            self.s.verify, self.s.trust_env = ca, False  # the environment may name other authorities

    def request(self, method, path, want=None, **kw):
        kw.setdefault("timeout", 120)
        r = self.s.request(method, self.base + path, **kw)
        if want is not None and r.status_code != want:
            raise AssertionError("%s %s: status %d, want %d: %s" % (method, r.url, r.status_code, want, r.text[:500]))
        return r

    def location(self, r):
        return requests.compat.urljoin(r.url, r.headers["Location"])

    def connection(self):
        """A connection for requests by hand, and the headers that each needs."""
        addr = self.base.split("/")[2]
        headers = requests.Request("GET", self.base, auth=self.s.auth).prepare().headers
        if self.base.startswith("https:"):
            return http.client.HTTPSConnection(addr, timeout=30, context=ssl.create_default_context(cafile=self.s.verify)), headers
        return http.client.HTTPConnection(addr, timeout=30), headers

    def push_blob(self, repo, b, digest=None, want=201):
        digest = digest or sha256(b)
        r = self.request("POST", "%s/blobs/uploads/" % repo, want=202)
        r = self.s.put(self.location(r), params={"digest": digest}, data=b, headers={"Content-Type": "application/octet-stream"}, timeout=300)
        if r.status_code != want:
            raise AssertionError("PUT blob %s: status %d, want %d: %s" % (digest, r.status_code, want, r.text[:500]))
        return r

    def push_manifest(self, repo, ref, media_type, raw, want=201):
        return self.request("PUT", "%s/manifests/%s" % (repo, ref), want=want, data=raw, headers={"Content-Type": media_type})

    def push_image(self, repo, ref, image):
        for b in image.blobs.values():
            self.push_blob(repo, b)
        return self.push_manifest(repo, ref, image.media_type, image.manifest)

    def manifest(self, repo, ref, accept=ACCEPT, want=200):
        return self.request("GET", "%s/manifests/%s" % (repo, ref), want=want, headers={"Accept": accept} if accept else {})

    def blob(self, repo, digest, want=200, **kw):
        return self.request("GET", "%s/blobs/%s" % (repo, digest), want=want, **kw)

    def check_image(self, repo, ref, image):
        """Pulls the whole image and compares every byte."""
        r = self.manifest(repo, ref)
        assert r.content == image.manifest
        assert r.headers["Docker-Content-Digest"] == image.digest
        assert r.headers["Content-Type"] == image.media_type
        for d, b in image.blobs.items():
            got = self.blob(repo, d)
            assert got.content == b, "blob %s differs" % d
            assert got.headers["Docker-Content-Digest"] == d

    def tags(self, repo, want=200):
        return self.request("GET", "%s/tags/list" % repo, want=want).json()

    def catalog(self):
        """All repositories, page by page."""
        out, path = [], "_catalog"
        while path:
            r = self.request("GET", path, want=200)
            out += r.json()["repositories"] or []
            nxt = r.links.get("next", {}).get("url")
            path = nxt.split("/v2/", 1)[1] if nxt else None
        return out


def error_code(r):
    """The code of the specification's JSON error body."""
    return r.json()["errors"][0]["code"]


def file_of(path, size, seed=1):
    """A file of bytes that don't compress; returns its digest."""
    h, left, rnd = hashlib.sha256(), size, random.Random(seed)
    with open(path, "wb") as f:
        while left:
            b = rnd.randbytes(min(left, 4 << 20))
            h.update(b)
            f.write(b)
            left -= len(b)
    return "sha256:" + h.hexdigest()


def read_all(resp, chunk=1 << 20):
    """Digest and length of a streamed response."""
    h, n = hashlib.sha256(), 0
    for b in resp.iter_content(chunk):
        h.update(b)
        n += len(b)
    return "sha256:" + h.hexdigest(), n


def have(tool):
    return any(os.access(os.path.join(p, tool), os.X_OK) for p in os.environ["PATH"].split(os.pathsep))
