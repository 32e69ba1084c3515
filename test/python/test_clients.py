"""The client matrix: every client that people point at a registry pushes at the proxy and pulls at an agent.

What a client can't do is tried all the same: the cell then holds the client's version and its own error, and CANT below says why that is expected. A client
that can after all fails the test, and so does every other error."""

import json
import os
import re
import shutil
import subprocess
import tarfile
import uuid

import pytest

from components import CA, ROOT, SECURE
from conftest import TABLES, skip
from containerd import Containerd
from utils import OCI_INDEX, OCI_MANIFEST, have, index_of, sha256, small_image, unique, write_oci_layout

TOOLS = os.path.join(ROOT, "bin", "tools")
OUT = os.path.join(ROOT, "test", "conformance", "out")
ARTIFACT_TYPE = "application/x-test"

OPS = ("push", "pull tag", "pull digest", "push index", "pull index", "push zstd", "pull zstd", "push artifact", "pull artifact", "referrers")
KINDS = {"index": "index", "zstd": "zstd", "artifact": "artifact", "referrers": "artifact"}  # the last word of an operation to what it is about; else an image


def plain(*flags):
    """Flags for a proxy without TLS. With it a client that needs none trusts the authority, and has a login; agents are plain always."""
    return [] if SECURE else list(flags)


def folder(parent, prefix=""):
    """A new folder whose path is a name that podman and buildah can parse: tempfile's may have a "_" where references have none."""
    path = os.path.join(parent, prefix + uuid.uuid4().hex[:10])
    os.mkdir(path, 0o700)
    return path


class Failed(Exception):
    """A client's program ended with an error; the text is what it printed."""


def command(*args, timeout=60, **kw):
    p = subprocess.run([str(a) for a in args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, **kw)
    if p.returncode != 0:
        raise Failed("%s\n%s" % (" ".join(map(str, args)), p.stdout))
    return p.stdout


class Source:
    """Something to push, as an OCI layout in a folder. A kind is image, index, zstd or artifact; an artifact has a subject, which is an image."""

    def __init__(self, kind, folder):
        self.kind, self.layout, self.subject = kind, os.path.join(folder, kind), None
        self.images = {a: small_image(architecture=a, compress="zstd" if kind == "zstd" else True) for a in (("amd64", "arm64") if kind == "index" else ("amd64",))}
        image = self.images["amd64"]
        self.blobs = {d: b for i in self.images.values() for d, b in i.blobs.items()}
        self.manifests = {i.digest: (i.media_type, i.manifest) for i in self.images.values()}
        self.digest, self.media_type = image.digest, image.media_type
        if kind == "index":
            self.media_type, raw = index_of(list(self.images.values()))
            self.digest = sha256(raw)
            self.manifests[self.digest] = self.media_type, raw
        if kind == "artifact":
            self.subject, self.payload = image, b"evidence of " + image.digest.encode()
            self.blobs = {sha256(b): b for b in (b"{}", self.payload)}
            raw = json.dumps({
                "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": ARTIFACT_TYPE,
                "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": sha256(b"{}"), "size": 2},
                "layers": [{"mediaType": "text/plain", "digest": sha256(self.payload), "size": len(self.payload)}],
                "subject": {"mediaType": image.media_type, "digest": image.digest, "size": len(image.manifest)},
            }).encode()
            self.digest, self.manifests = sha256(raw), {sha256(raw): (OCI_MANIFEST, raw)}
        raw = self.manifests[self.digest][1]
        write_oci_layout(self.layout, {"mediaType": self.media_type, "digest": self.digest, "size": len(raw)}, dict(self.blobs, **{d: m for d, (_, m) in self.manifests.items()}))
        for a, i in self.images.items():
            write_oci_layout(self.layout + "-" + a, i.descriptor(), dict(i.blobs, **{i.digest: i.manifest}))

    def archive(self, arch, ref, path):
        """What `docker load` reads."""
        image = self.images[arch]
        config = json.loads(image.manifest)["config"]["digest"]
        names = {config: "config.json", **{d: "%d.tar" % n for n, d in enumerate(image.layers)}}
        index = json.dumps([{"Config": names[config], "RepoTags": [ref], "Layers": [names[d] for d in image.layers]}]).encode()
        os.makedirs(path + ".d")
        for name, b in [("manifest.json", index)] + [(n, image.blobs[d]) for d, n in names.items()]:
            with open(os.path.join(path + ".d", name), "wb") as f:
                f.write(b)
        with tarfile.open(path, "w") as t:
            t.add(path + ".d", arcname=".")
        return path

    def push_by_hand(self, registry, repo):
        """For what a client can't push itself."""
        for b in self.blobs.values():
            registry.push_blob(repo, b)
        for d, (media_type, raw) in self.manifests.items():
            registry.push_manifest(repo, "v1" if d == self.digest else d, media_type, raw)
        return self.digest


def content(registry, repo, ref):
    """All that a manifest leads to, digest to bytes, each compared with its digest. The first is the manifest itself."""
    r = registry.manifest(repo, ref)
    digest = r.headers["Docker-Content-Digest"]
    assert sha256(r.content) == digest
    out, doc = {digest: r.content}, r.json()
    for d in doc.get("manifests", []):
        out.update(content(registry, repo, d["digest"]))
    for d in ([doc["config"]] if "config" in doc else []) + doc.get("layers", []):
        out[d["digest"]] = registry.blob(repo, d["digest"]).content
        assert sha256(out[d["digest"]]) == d["digest"] and len(out[d["digest"]]) == d["size"]
    return out


def diff_ids(want, arch):
    """The layers that an image of this architecture has unpacked, by its config."""
    for b in want.values():
        if b.startswith(b"{"):
            doc = json.loads(b)
            if "rootfs" in doc and doc["architecture"] == arch:
                return doc["rootfs"]["diff_ids"]
    raise AssertionError("no config for " + arch)


def check_layout(folder, want):
    """An OCI layout that a client wrote has every byte of what was wanted."""
    for d, b in want.items():
        with open(os.path.join(folder, "blobs", *d.split(":")), "rb") as f:
            assert f.read() == b, d


class Client:
    """One client. push and referrers answer what the client says; pull compares what it got with `want`, digest to bytes."""

    def __init__(self, lab):
        self.lab, self.dir = lab, lab.dir

    @property
    def proxy(self):
        return self.lab.proxy.addr

    @property
    def agent(self):
        return self.lab.agent.addr

    def path(self):
        """A path that nobody has used."""
        return os.path.join(folder(self.dir), "x")

    def end(self):
        pass


class Docker(Client):
    needs = ("docker", "dockerd")

    def version(self):
        return command("docker", "version", "--format", "{{.Server.Version}}").strip()

    def push(self, source, repo):
        ref = "%s/%s" % (self.proxy, repo)
        if source.kind == "artifact":
            command("docker", "artifact", "push", ref + ":v1")
        if source.kind == "zstd":
            command("docker", "push", "--compression-format", "zstd", ref + ":v1")
        if source.kind == "image":
            return self.push_image(source, "amd64", ref + ":v1")
        for a in source.images:
            self.push_image(source, a, "%s:%s" % (ref, a))
        command("docker", "manifest", "create", "--insecure", ref + ":v1", *["%s:%s" % (ref, a) for a in source.images])
        return command("docker", "manifest", "push", "--insecure", "--purge", ref + ":v1").split()[-1]

    def push_image(self, source, arch, ref):
        command("docker", "load", "-i", source.archive(arch, ref, self.path()))
        try:
            return re.search(r"digest: (sha256:\w+)", command("docker", "push", ref)).group(1)
        finally:
            command("docker", "rmi", "-f", ref)

    def pull(self, kind, repo, ref, want):
        name, arch = "%s/%s%s" % (self.agent, repo, ref), "arm64" if kind == "index" else "amd64"
        out = command("docker", "pull", "--platform", "linux/" + arch, name)
        try:
            assert "Digest: " + next(iter(want)) in out
            assert json.loads(command("docker", "image", "inspect", name))[0]["RootFS"]["Layers"] == diff_ids(want, arch)
        finally:
            command("docker", "rmi", "-f", name)

    def referrers(self, repo, digest):
        return command("docker", "referrers", "%s/%s@%s" % (self.agent, repo, digest))


class Podman(Client):
    program = "podman"
    needs = ("podman",)

    def __init__(self, lab):
        super().__init__(lab)
        self.home = folder("/tmp", "k")  # podman refuses a runroot of over 50 characters

    def run(self, *args):
        return command(self.program, "--root", self.home + "/r", "--runroot", self.home + "/u", "--storage-driver", "vfs", *args)

    def end(self):
        command(self.program, "--root", self.home + "/r", "--runroot", self.home + "/u", "--storage-driver", "vfs", "rmi", "-a", "-f")
        shutil.rmtree(self.home, ignore_errors=True)

    def version(self):
        return command(self.program, "--version").split()[2]

    def push(self, source, repo):
        to, report = "docker://%s/%s:v1" % (self.proxy, repo), self.path()
        flags = [*plain("--tls-verify=false"), "--digestfile", report]
        if source.kind == "index":
            self.run("manifest", "create", "list")
            for a in source.images:
                self.run("manifest", "add", "list", "oci:%s-%s:v1" % (source.layout, a))
            self.run("manifest", "push", *flags, "--all", "list", to)
            self.run("manifest", "rm", "list") if self.program == "podman" else self.run("rmi", "list")
        else:
            image = self.run("pull", "-q", "oci:%s:v1" % source.layout).split()[-1]
            self.run("push", *flags, *(["--compression-format", "zstd"] if source.kind == "zstd" else []), image, to)
            self.run("rmi", "-f", image)
        with open(report) as f:
            return f.read().strip()

    def pull(self, kind, repo, ref, want):
        name, arch = "%s/%s%s" % (self.agent, repo, ref), "arm64" if kind == "index" else "amd64"
        self.run("pull", "--tls-verify=false", "--arch", arch, name)
        self.inspect(name, want, arch)
        self.run("rmi", "-f", name)

    def inspect(self, name, want, arch):
        info = json.loads(self.run("image", "inspect", name))[0]
        assert any(d.endswith("@" + next(iter(want))) for d in info["RepoDigests"]), info["RepoDigests"]
        assert info["RootFS"]["Layers"] == diff_ids(want, arch)

    def referrers(self, repo, digest):
        return self.run("artifact", "referrers", "%s/%s@%s" % (self.agent, repo, digest))


class Buildah(Podman):
    program = "buildah"
    needs = ("buildah",)

    def inspect(self, name, want, arch):
        info = json.loads(self.run("inspect", "--type", "image", name))
        manifest = json.loads(info["Manifest"])
        assert info["FromImageDigest"] in want and info["OCIv1"]["rootfs"]["diff_ids"] == diff_ids(want, arch)
        assert {d["digest"] for d in manifest["layers"]} <= set(want)


class Skopeo(Client):
    needs = ("skopeo",)

    def version(self):
        return command("skopeo", "--version").split()[2]

    def push(self, source, repo):
        report = self.path()
        command("skopeo", "--insecure-policy", "copy", "--all", "--preserve-digests", *plain("--dest-tls-verify=false"), "--digestfile", report,
                "oci:%s:v1" % source.layout, "docker://%s/%s:v1" % (self.proxy, repo))
        with open(report) as f:
            return f.read().strip()

    def pull(self, kind, repo, ref, want):
        to = self.path()
        command("skopeo", "--insecure-policy", "copy", "--all", "--preserve-digests", "--src-tls-verify=false", "docker://%s/%s%s" % (self.agent, repo, ref), "oci:%s:v1" % to)
        check_layout(to, want)

    def referrers(self, repo, digest):
        return command("skopeo", "referrers", "--tls-verify=false", "docker://%s/%s@%s" % (self.agent, repo, digest))


class Tool(Client):
    """A Go program from bin/tools."""

    needs = ()

    def run(self, *args):
        return command(os.path.join(TOOLS, self.program), *args)


class Crane(Tool):
    program = "crane"

    def version(self):
        return self.run("version").strip()

    def push(self, source, repo):
        return self.run("push", source.layout, "%s/%s:v1" % (self.proxy, repo)).strip().rpartition("@")[2]

    def pull(self, kind, repo, ref, want):
        to = self.path()
        self.run("pull", "--format", "oci", "%s/%s%s" % (self.agent, repo, ref), to)
        check_layout(to, want)

    def referrers(self, repo, digest):
        return self.run("referrers", "%s/%s@%s" % (self.agent, repo, digest))


class Regctl(Tool):
    program = "regctl"

    def run(self, *args):
        return super().run("--host", "reg=%s,tls=%s" % (self.proxy, "enabled" if SECURE else "disabled"), "--host", "reg=%s,tls=disabled" % self.agent, *args)

    def version(self):
        return re.search(r"VCSTag: *(\S+)", self.run("version")).group(1)

    def push(self, source, repo):
        ref = "%s/%s:v1" % (self.proxy, repo)
        if source.kind == "artifact":
            path = self.path()
            with open(path, "wb") as f:
                f.write(source.payload)
            return self.run("artifact", "put", "--artifact-type", ARTIFACT_TYPE, "--subject", "%s/%s@%s" % (self.proxy, repo, source.subject.digest), "-f", path,
                            "--format", "{{ .Manifest.GetDescriptor.Digest }}").strip()
        self.run("image", "copy", "ocidir://%s:v1" % source.layout, ref)
        return self.run("manifest", "head", ref).strip()

    def pull(self, kind, repo, ref, want):
        to = self.path()
        self.run("image", "copy", "%s/%s%s" % (self.agent, repo, ref), "ocidir://%s:v1" % to)
        check_layout(to, want)

    def referrers(self, repo, digest):
        return self.run("artifact", "list", "--filter-artifact-type", ARTIFACT_TYPE, "%s/%s@%s" % (self.agent, repo, digest))


class Oras(Tool):
    program = "oras"

    def version(self):
        return self.run("version").split()[1]

    def push(self, source, repo):
        ref = "%s/%s" % (self.proxy, repo)
        if source.kind == "artifact":
            path = self.path()
            with open(path, "wb") as f:
                f.write(source.payload)
            out = self.run("attach", *plain("--plain-http"), "--disable-path-validation", "--format", "json", "--artifact-type", ARTIFACT_TYPE, "%s@%s" % (ref, source.subject.digest), path + ":text/plain")
            return json.loads(out)["digest"]
        out = self.run("cp", "--no-tty", "--from-oci-layout", source.layout + ":v1", *plain("--to-plain-http"), ref + ":v1")
        return re.search(r"Digest: (sha256:\w+)", out).group(1)

    def pull(self, kind, repo, ref, want):
        to = self.path()
        self.run("cp", "--no-tty", "--from-plain-http", "%s/%s%s" % (self.agent, repo, ref), "--to-oci-layout", to + ":v1")
        check_layout(to, want)

    def referrers(self, repo, digest):
        return self.run("discover", "--plain-http", "--format", "json", "--artifact-type", ARTIFACT_TYPE, "%s/%s@%s" % (self.agent, repo, digest))


class Ctr(Client):
    needs = ("containerd", "ctr", "runc")
    namespace = "default"

    def ctr(self, *args):
        return command("ctr", "-a", self.lab.containerd().sock, "-n", self.namespace, *args)

    def version(self):
        return re.search(r"Server:\s+Version: +(\S+)", self.ctr("version")).group(1)

    def push(self, source, repo):
        local, path = "local/" + source.kind, self.path()
        with tarfile.open(path, "w") as t:
            t.add(source.layout, arcname=".")
        self.ctr("images", "import", "--base-name", local, "--all-platforms", "--no-unpack", path)
        try:
            self.ctr("images", "push", *self.lab.containerd().proxy(self.lab.login), "%s/%s:v1" % (self.proxy, repo), local + ":v1")
            return re.search(r"sha256:\w+", self.ctr("images", "ls", "name==%s:v1" % local)).group()
        finally:
            self.ctr("images", "rm", "--sync", local + ":v1")  # and its content, or a pull would fetch nothing

    def pull(self, kind, repo, ref, want):
        name = "%s/%s%s" % (self.agent, repo, ref)
        self.ctr(*(["content", "fetch"] if kind == "artifact" else ["images", "pull"]), "--plain-http", *(["--all-platforms"] if kind == "index" else []), name)
        assert next(iter(want)) in self.ctr("images", "ls", "name==" + name)
        self.check(want)
        self.ctr("images", "rm", "--sync", name)

    def check(self, want):
        for d, b in want.items():
            assert subprocess.run(["ctr", "-a", self.lab.containerd().sock, "-n", self.namespace, "content", "get", d], stdout=subprocess.PIPE, check=True).stdout == b

    def referrers(self, repo, digest):
        return self.ctr("content", "referrers", "--plain-http", "%s/%s@%s" % (self.agent, repo, digest))


class CRI(Ctr):
    """kubelet's interface. It pulls by the proxy's name, which hosts.toml sends to the agent."""

    namespace = "k8s.io"

    def crictl(self, *args):
        end = "unix://" + self.lab.containerd().sock
        return command(os.path.join(TOOLS, "crictl"), "--runtime-endpoint", end, "--image-endpoint", end, "--timeout", "60s", *args)

    def push(self, source, repo):
        return self.crictl("push", "%s/%s:v1" % (self.proxy, repo))

    def pull(self, kind, repo, ref, want):
        name = "%s/%s%s" % (self.proxy, repo, ref)
        self.crictl("pull", name)
        out = self.crictl("inspecti", "-o", "json", name)
        info = json.loads(out[out.index("{"):])["status"]  # warnings come before it
        assert any(d.endswith("@" + next(iter(want))) for d in info["repoDigests"])
        if kind == "index":  # this machine's platform alone
            mine = json.loads(want[next(iter(want))])["manifests"][0]["digest"]
            doc = json.loads(want[mine])
            want = {d: want[d] for d in [next(iter(want)), mine, doc["config"]["digest"]] + [layer["digest"] for layer in doc["layers"]]}
        self.check(want)
        self.crictl("rmi", name)

    def referrers(self, repo, digest):
        return self.crictl("referrers", "%s/%s@%s" % (self.proxy, repo, digest))


CLIENTS = {"docker": Docker, "podman": Podman, "buildah": Buildah, "skopeo": Skopeo, "crane": Crane, "regctl": Regctl, "oras": Oras, "ctr": Ctr, "cri": CRI}

# (client, operation) to why, and to what the client itself says then.
GZIP = "this docker writes and reads layers by gzip alone"
NO_ARTIFACTS = "it stores images, and an artifact's config is none"
NO_REFERRERS = "it has no command for them"
PULLS_ONLY = "CRI has no push"
NOT_AN_IMAGE = r'unsupported image-specific operation on artifact with type "application/vnd.oci.empty.v1\+json"'
CANT = {
    ("docker", "push zstd"): (GZIP, r"unknown flag: --compression-format"),
    ("docker", "pull zstd"): (GZIP, r"failed to register layer: Error processing tar file"),
    ("docker", "push artifact"): (NO_ARTIFACTS, r"unknown command: docker artifact|'artifact' is not a docker command"),
    ("docker", "pull artifact"): (NO_ARTIFACTS, r"unsupported media type application/vnd.oci.empty.v1\+json"),
    ("docker", "referrers"): (NO_REFERRERS, r"unknown command: docker referrers|'referrers' is not a docker command"),
    ("podman", "push artifact"): (NO_ARTIFACTS, NOT_AN_IMAGE),
    ("podman", "pull artifact"): (NO_ARTIFACTS, NOT_AN_IMAGE),
    ("podman", "referrers"): (NO_REFERRERS, r"unrecognized command `podman artifact`"),
    ("buildah", "push artifact"): (NO_ARTIFACTS, NOT_AN_IMAGE),
    ("buildah", "pull artifact"): (NO_ARTIFACTS, NOT_AN_IMAGE),
    ("buildah", "referrers"): (NO_REFERRERS, r'unknown command "artifact" for "buildah"'),
    ("skopeo", "referrers"): (NO_REFERRERS, r"Unrecognized command `skopeo referrers`"),
    ("crane", "referrers"): (NO_REFERRERS, r'unknown command "referrers" for "crane"'),
    ("ctr", "referrers"): (NO_REFERRERS, r"No help topic for 'referrers'"),
    ("cri", "push"): (PULLS_ONLY, r"No help topic for 'push'"),
    ("cri", "push index"): (PULLS_ONLY, r"No help topic for 'push'"),
    ("cri", "push zstd"): (PULLS_ONLY, r"No help topic for 'push'"),
    ("cri", "push artifact"): (PULLS_ONLY, r"No help topic for 'push'"),
    ("cri", "pull artifact"): ("it unpacks what it pulls", r"level=fatal.*mismatched image rootfs and manifest layers"),
    ("cri", "referrers"): (NO_REFERRERS, r"No help topic for 'referrers'"),
}
if SECURE:
    CANT["docker", "push index"] = "its manifest command takes loopback for plain HTTP", r"failed to put manifest .*(connection reset by peer|HTTPS server)"


class Lab:
    """What the cells share: the cluster, sources, what was pushed, and the matrix."""

    def __init__(self, cluster):
        self.cluster, self.proxy, self.agent = cluster, cluster.proxy, cluster.agents[0]
        self.login = cluster.login()
        self.dir = folder("/tmp", "kcl")
        self.made, self.versions, self.sources, self.pushed = {}, {}, {}, {}  # by client, by client and kind
        self.cells, self.notes = {}, []
        self._containerd = None

    def containerd(self):
        if not self._containerd:
            self._containerd = Containerd(self.proxy.addr, self.agent.addr, CA if SECURE else None)
        return self._containerd

    def client(self, name):
        for n in CLIENTS[name].needs:
            if not have(n) and not os.path.exists("/usr/sbin/" + n):
                self.cells.update({(name, o): "not installed" for o in OPS})
                skip("%s is not installed: run test/setup.sh as root" % n)
        if "containerd" in CLIENTS[name].needs and os.geteuid() != 0:
            skip("containerd needs root")
        if name not in self.made:
            self.made[name] = CLIENTS[name](self)
            self.versions[name] = self.made[name].version()
        return self.made[name]

    def source(self, name, kind):
        """Bytes of its own for each client, so that no pull is served from what another pulled."""
        if (name, kind) not in self.sources:
            self.sources[name, kind] = Source(kind, folder(self.dir))
        return self.sources[name, kind]

    def repo(self, source):
        """A repository, with the subject of an artifact in it."""
        repo = unique("test/clients")
        if source.subject:
            self.proxy.registry().push_image(repo, source.subject.digest, source.subject)
        return repo

    def end(self):
        for c in self.made.values():
            c.end()
        if self._containerd:
            self._containerd.end()
        shutil.rmtree(self.dir, ignore_errors=True)
        text = self.table()
        os.makedirs(OUT, exist_ok=True)
        with open(os.path.join(OUT, "clients-secure.txt" if SECURE else "clients.txt"), "w") as f:
            f.write(text)
        TABLES.append(text)

    def table(self):
        names = {n: "%s %s" % (n, self.versions.get(n, "")) for n in CLIENTS}
        wide = max(map(len, names.values())) + 2
        lines = ["client".ljust(wide) + "".join(o.ljust(19) for o in OPS)]
        lines += [(names[n].ljust(wide) + "".join(self.cells.get((n, o), "not run").ljust(19) for o in OPS)).rstrip() for n in CLIENTS]
        return "\n".join(lines + [""] + ["[%d] %s" % (i + 1, n) for i, n in enumerate(self.notes)]) + "\n"


@pytest.fixture(scope="module")
def lab(_cluster):
    _cluster.revive()
    lab = Lab(_cluster)
    yield lab
    lab.end()


def perform(lab, name, op):
    """One cell."""
    client, proxy = lab.client(name), lab.proxy.registry()
    kind = KINDS.get(op.split()[-1], "image")
    source = lab.source(name, kind)
    if op.startswith("push"):
        repo = lab.repo(source)
        said = client.push(source, repo)
        got = content(proxy, repo, said if kind == "artifact" else "v1")
        assert next(iter(got)) == said
        assert got == content(lab.cluster.agents[1].registry(), repo, said)
        layers = [d for b in got.values() if b.startswith(b"{") for d in json.loads(b).get("layers", [])]
        if kind == "zstd":
            assert layers and all(d["mediaType"].endswith("+zstd") for d in layers)
        if kind == "index":
            assert {m["platform"]["architecture"] for m in json.loads(got[said])["manifests"]} == set(source.images)
        if kind == "artifact":
            refs = proxy.request("GET", "%s/referrers/%s" % (repo, source.subject.digest), want=200).json()["manifests"]
            assert [d["digest"] for d in refs] == [said] and refs[0]["artifactType"] == ARTIFACT_TYPE
            assert source.payload in got.values()
        lab.pushed[name, kind] = repo, said
        return
    if (name, kind) not in lab.pushed:
        repo = lab.repo(source)
        lab.pushed[name, kind] = repo, source.push_by_hand(proxy, repo)
    repo, digest = lab.pushed[name, kind]
    if op == "referrers":
        assert digest in client.referrers(repo, source.subject.digest)
    else:
        client.pull(kind, repo, ":v1" if op == "pull tag" else "@" + digest, content(proxy, repo, digest))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", CLIENTS)
def test_client(lab, name, op):
    reason, error = CANT.get((name, op), (None, None))
    lab.client(name)
    lab.cells[name, op] = "FAILED"
    try:
        perform(lab, name, op)
    except Failed as e:
        if not reason or not re.search(error, str(e)):
            raise
        said = next(line.strip() for line in str(e).splitlines()[1:] if re.search(error, line))
        lab.notes.append("%s %s, %s: %s (%s)" % (name, lab.versions[name], op, said, reason))
        lab.cells[name, op] = "client can't [%d]" % len(lab.notes)
        return
    assert not reason, "%s %s can: take it off the list of what clients can't" % (name, op)
    lab.cells[name, op] = "ok"
