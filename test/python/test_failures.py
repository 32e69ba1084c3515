"""What keeps working when a part is down, and what bad input changes: nothing."""

import hashlib

import pytest

from utils import OCI_MANIFEST, error_code, noise, sha256, small_image, unique


@pytest.mark.parametrize("victim", ["tracker-01", "build-index-01", "proxy-01", "origin-01", "origin-02", "origin-03"])
def test_pull_with_one_component_stopped(cluster, proxy, agents, victim):
    """An agent that lacks the blobs pulls them by digest, and by a tag that it has resolved before."""
    agent = agents[0]
    repo, image = unique("test/one-down"), small_image()
    big = noise(5 << 20, repo)
    proxy.push_image(repo, "v1", image)
    proxy.push_blob(repo, big)
    agent.manifest(repo, "v1")  # resolved, no blob pulled
    cluster[victim].stop()
    r = agent.manifest(repo, "v1")
    assert r.content == image.manifest
    if victim == "build-index-01":
        assert r.headers["Warning"].startswith("110 ")
    assert agent.manifest(repo, image.digest).content == image.manifest
    for d, b in image.blobs.items():
        assert agent.blob(repo, d).content == b
    assert agent.blob(repo, sha256(big)).content == big


def test_push_with_one_origin_stopped(cluster, proxy, agent):
    """Pushes succeed with an origin down, and the blob gets its second copy when it is back."""
    for origin in cluster.origins:
        repo, image = unique("test/push-one-down"), small_image()
        origin.stop()
        proxy.push_image(repo, "v1", image)
        proxy.check_image(repo, "v1", image)
        agent.check_image(repo, "v1", image)
        origin.start()


def test_tag_overwrite_is_real(proxy, agents):
    """After a push every agent resolves the tag to the new image, after a delete to none."""
    repo = unique("test/overwrite")
    for _ in range(3):
        image = small_image()
        proxy.push_image(repo, "latest", image)
        for a in agents:
            assert a.manifest(repo, "latest").content == image.manifest
    proxy.request("DELETE", "%s/manifests/latest" % repo, want=202)
    for a in agents:
        assert error_code(a.manifest(repo, "latest", want=404)) == "MANIFEST_UNKNOWN"


def test_wrong_digest_is_refused(cluster, proxy):
    """Bytes that don't match their digest: 400 DIGEST_INVALID, and nothing of them stays at any origin."""
    repo, b = unique("test/wrong"), noise(300_000, "wrong")
    lie = sha256(b + b"x")
    r = proxy.push_blob(repo, b, digest=lie, want=400)
    assert error_code(r) == "DIGEST_INVALID"
    for d in (lie, sha256(b)):
        assert error_code(proxy.blob(repo, d, want=404)) == "BLOB_UNKNOWN"
        for o in cluster.origins:
            o.registry().request("HEAD", "%s/_kraken/blobs/%s" % (repo, d), want=404)


@pytest.mark.parametrize("method,path,data,headers,status,code,names", [
    ("GET", "UPPER/case/manifests/v1", None, {}, 400, "NAME_INVALID", "UPPER/case"),
    ("POST", "{repo}-/blobs/uploads/", None, {}, 400, "NAME_INVALID", "{repo}-"),
    ("GET", "{repo}/manifests/-tag", None, {}, 400, "MANIFEST_INVALID", "-tag"),
    ("GET", "{repo}/blobs/sha256:zz", None, {}, 400, "DIGEST_INVALID", "sha256:zz"),
    ("GET", "{repo}/blobs/md5:d41d8cd98f00b204e9800998ecf8427e", None, {}, 400, "DIGEST_INVALID", "md5:d41d8cd98f00b204e9800998ecf8427e"),
    ("POST", "{repo}/blobs/uploads/?digest=sha256:zz", b"x", {}, 400, "DIGEST_INVALID", "sha256:zz"),
    ("PUT", "{repo}/manifests/v1", b"not json", {"Content-Type": OCI_MANIFEST}, 400, "MANIFEST_INVALID", "JSON"),
    ("PUT", "{repo}/manifests/v1", b'{"schemaVersion":1}', {"Content-Type": OCI_MANIFEST}, 400, "MANIFEST_INVALID", "schemaVersion is 1"),
    ("PUT", "{repo}/manifests/v1", b"{}" + b" " * (4 << 20), {"Content-Type": OCI_MANIFEST}, 413, "MANIFEST_INVALID", "%d bytes" % ((4 << 20) + 2)),
    ("GET", "{repo}/blobs/uploads/nosuchsession", None, {}, 404, "BLOB_UPLOAD_UNKNOWN", "nosuchsession"),
    ("PATCH", "{repo}/blobs/uploads/nosuchsession", b"x", {}, 404, "BLOB_UPLOAD_UNKNOWN", "nosuchsession"),
    ("PUT", "{repo}/blobs/uploads/nosuchsession?digest=" + sha256(b"x"), b"x", {}, 404, "BLOB_UPLOAD_UNKNOWN", "nosuchsession"),
    ("GET", "{repo}/tags/list?n=-3", None, {}, 400, "PAGINATION_NUMBER_INVALID", "-3"),
], ids=lambda v: "long" if isinstance(v, bytes) and len(v) > 100 else None)
def test_bad_input(cluster, proxy, method, path, data, headers, status, code, names):
    """The specification's JSON error and status; it says what was wrong, and not where inside the cluster; nothing changes."""
    repo = unique("test/bad")
    r = proxy.request(method, path.format(repo=repo), want=status, data=data, headers=headers)
    assert error_code(r) == code
    assert r.headers["Content-Type"].startswith("application/json")
    assert names.format(repo=repo) in r.json()["errors"][0]["message"]
    assert cluster.build_index.addr not in r.text
    assert error_code(proxy.request("GET", repo + "/tags/list", want=404)) == "NAME_UNKNOWN"
    assert repo not in proxy.catalog()


def test_out_of_order_chunk(proxy):
    """A gap or an overlap is 416 with the session's true range; the session survives and completes."""
    repo, b = unique("test/chunks"), noise(100_000, "chunks")
    r = proxy.request("POST", "%s/blobs/uploads/" % repo, want=202)
    url = proxy.location(r)

    def patch(at, part):
        return proxy.s.patch(url, data=part, headers={"Content-Range": "%d-%d" % (at, at + len(part) - 1), "Content-Type": "application/octet-stream"}, timeout=30)

    assert patch(5, b[5:10]).status_code == 416
    r = patch(0, b[:50_000])
    assert r.status_code == 202 and r.headers["Range"] == "0-49999"
    url = proxy.location(r)
    for at in (60_000, 10_000):
        r = patch(at, b[at:at + 100])
        assert r.status_code == 416 and r.headers["Range"] == "0-49999"
    r = proxy.s.get(url, timeout=30)
    assert r.status_code == 204 and r.headers["Range"] == "0-49999"
    url = proxy.location(r)
    r = patch(50_000, b[50_000:])
    assert r.status_code == 202
    r = proxy.s.put(proxy.location(r), params={"digest": sha256(b)}, timeout=30)
    assert r.status_code == 201
    assert hashlib.sha256(proxy.blob(repo, sha256(b)).content).hexdigest() == sha256(b)[7:]


def test_manifest_with_missing_blob(proxy):
    """404 MANIFEST_BLOB_UNKNOWN names what is missing; the tag does not exist afterwards."""
    repo, image = unique("test/missing"), small_image()
    r = proxy.push_manifest(repo, "v1", OCI_MANIFEST, image.manifest, want=404)
    assert error_code(r) == "MANIFEST_BLOB_UNKNOWN"
    for d in image.blobs:
        assert d in r.text
    proxy.manifest(repo, "v1", want=404)


def test_membership_is_by_repository(proxy):
    """A blob of one repository is not visible in another; mounting makes it so; deleting there leaves the first alone."""
    a, b, blob = unique("test/member-a"), unique("test/member-b"), noise(10_000, unique("x"))
    proxy.push_blob(a, blob)
    d = sha256(blob)
    proxy.blob(b, d, want=404)
    r = proxy.request("POST", "%s/blobs/uploads/?mount=%s&from=%s" % (b, d, a), want=201)
    assert r.headers["Docker-Content-Digest"] == d
    assert proxy.blob(b, d).content == blob
    proxy.request("DELETE", "%s/blobs/%s" % (b, d), want=202)
    proxy.blob(b, d, want=404)
    assert proxy.blob(a, d).content == blob
