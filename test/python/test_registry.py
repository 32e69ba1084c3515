"""The registry API as the specification has it, at a running cluster: what neither the conformance suite nor a client asks for."""

import email
import hashlib
import json

import pytest

from components import SECURE
from utils import OCI_INDEX, OCI_MANIFEST, error_code, index_of, noise, sha256, small_image, unique


def sha512(b):
    return "sha512:" + hashlib.sha512(b).hexdigest()


def start(proxy, repo):
    r = proxy.request("POST", "%s/blobs/uploads/" % repo, want=202)
    assert r.headers["Location"].startswith("/v2/"), "locations are relative"
    return r


def artifact_of(subject, kind, n, annotations=None):
    empty = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": sha256(b"{}"), "size": 2}
    return json.dumps({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": kind, "config": empty, "layers": [empty], "annotations": dict(annotations or {}, n=str(n)),
        "subject": {"mediaType": subject.media_type, "digest": subject.digest, "size": len(subject.manifest)},
    }).encode()


def referrers(registry, repo, digest, **params):
    """All descriptors, page by page, and the number of pages."""
    out, pages, path = [], 0, "%s/referrers/%s" % (repo, digest)
    while path:
        r = registry.request("GET", path, want=200, params=params)
        assert r.headers["Content-Type"] == OCI_INDEX and r.json()["mediaType"] == OCI_INDEX and r.json()["schemaVersion"] == 2
        assert (r.headers.get("OCI-Filters-Applied") == "artifactType") == ("artifactType=" in r.url)
        out, pages = out + r.json()["manifests"], pages + 1
        link = r.links.get("next", {}).get("url")
        path, params = link.split("/v2/", 1)[1] if link else None, {}
    return out, pages


def test_chunked_upload(proxy):
    """Chunks, a gap and an overlap (416 with the true Range), status, a digest of sha512 that is named first at the end."""
    repo, b = unique("test/chunks"), noise(300_000, "chunks")
    r = start(proxy, repo)
    assert int(r.headers["OCI-Chunk-Min-Length"]) > 0
    at = proxy.location(r)

    def patch(first, last, want):
        r = proxy.s.patch(at, data=b[first:last + 1], headers={"Content-Range": "%d-%d" % (first, last), "Content-Type": "application/octet-stream"}, timeout=30)
        assert r.status_code == want, r.text
        return r

    first = patch(5, 99, 416)  # before any byte
    assert first.headers["Location"] and first.headers["Range"] == "0-0"
    r = patch(0, 99_999, 202)
    at = proxy.location(r)
    for gap in ((200_000, 200_009), (50_000, 50_009), (99_999, 100_009)):
        r = patch(*gap, 416)
        assert r.headers["Range"] == "0-99999" and r.headers["Location"] and error_code(r) == "BLOB_UPLOAD_INVALID"
    r = proxy.s.get(at, timeout=30)
    assert r.status_code == 204 and r.headers["Range"] == "0-99999"
    # no Content-Range, chunked: what docker and podman send
    r = proxy.s.patch(at, data=iter([b[100_000:150_000], b[150_000:200_000]]), timeout=30)
    assert r.status_code == 202 and r.headers["Range"] == "0-199999"
    at = proxy.location(r)
    r = proxy.s.put(at, params={"digest": sha512(b)}, data=b[1:], headers={"Content-Range": "1-299999"}, timeout=30)
    assert r.status_code == 416, "a last chunk out of order"
    r = proxy.s.put(at, params={"digest": sha512(b)}, data=b[200_000:], headers={"Content-Range": "200000-299999"}, timeout=30)
    assert r.status_code == 201 and r.headers["Docker-Content-Digest"] == sha512(b), r.text
    assert proxy.s.get(proxy.location(r), timeout=30).content == b
    assert proxy.s.get(at, timeout=30).status_code == 404


def test_uploads_end(proxy):
    """A cancelled session is gone; a wrong digest leaves no blob; a monolithic POST needs one request."""
    repo, b = unique("test/uploads"), noise(1000, "uploads")
    at = proxy.location(start(proxy, repo))
    assert proxy.s.delete(at, timeout=30).status_code == 204
    for method in ("GET", "PATCH", "PUT", "DELETE"):
        r = proxy.s.request(method, at, params={"digest": sha256(b)}, timeout=30)
        assert r.status_code == 404 and error_code(r) == "BLOB_UPLOAD_UNKNOWN"
    r = proxy.request("POST", "%s/blobs/uploads/" % repo, want=400, params={"digest": sha256(b"other")}, data=b)
    assert error_code(r) == "DIGEST_INVALID"
    for d in (sha256(b), sha512(b)):
        r = proxy.request("POST", "%s/blobs/uploads/" % repo, want=201, params={"digest": d}, data=b)
        assert r.headers["Docker-Content-Digest"] == d and proxy.s.get(proxy.location(r), timeout=30).content == b
    proxy.push_blob(repo, b"")  # no bytes at all
    assert proxy.blob(repo, sha256(b"")).content == b""


def test_mounts_and_membership(proxy):
    """A blob is a member of the repositories that it was pushed or mounted to: elsewhere it is neither visible nor deletable."""
    a, b, c = unique("test/member"), unique("test/member"), unique("test/member")
    blob = noise(5000, a)
    d = sha256(blob)
    proxy.push_blob(a, blob)
    for method in ("GET", "HEAD", "DELETE"):
        proxy.request(method, "%s/blobs/%s" % (b, d), want=404)
    for source in ({}, {"from": a}):
        r = proxy.request("POST", "%s/blobs/uploads/" % b, want=202, params=dict(source, mount=sha256(noise(9, b))))
        proxy.s.delete(proxy.location(r), timeout=30).raise_for_status()  # a session, to push what no repository has
    proxy.request("POST", "%s/blobs/uploads/" % b, want=201, params={"mount": d, "from": a})
    r = proxy.request("POST", "%s/blobs/uploads/" % c, want=201, params={"mount": d})  # without from
    e = unique("test/member")
    proxy.request("POST", "%s/blobs/uploads/" % e, want=201, params={"mount": d, "from": unique("test/member")})  # from one that lacks it
    assert proxy.blob(e, d).content == blob
    assert proxy.s.get(proxy.location(r), timeout=30).content == blob
    proxy.request("DELETE", "%s/blobs/%s" % (a, d), want=202)
    for method in ("GET", "HEAD", "DELETE"):
        proxy.request(method, "%s/blobs/%s" % (a, d), want=404)
    assert proxy.blob(b, d).content == blob and proxy.blob(c, d).content == blob


@pytest.mark.parametrize("size", [5000, 6 << 20])
def test_ranges(proxy, agent, size):
    """Closed, open, suffix and several ranges, If-Range, If-None-Match, 416; at the agent first of a blob that it lacks."""
    repo, b = unique("test/ranges"), noise(size, "ranges%d" % size)
    proxy.push_blob(repo, b)
    d = sha256(b)
    for registry in (agent, proxy):
        def get(spec, want=206, **headers):
            return registry.blob(repo, d, want=want, headers=dict(headers, Range=spec))

        r = get("bytes=10-19,-7,%d-" % (size - 3))
        assert r.headers["Content-Type"].startswith("multipart/byteranges; boundary=")
        parts = email.message_from_bytes(b"Content-Type: " + r.headers["Content-Type"].encode() + b"\r\n\r\n" + r.content).get_payload()
        assert [p["Content-Range"] for p in parts] == ["bytes %d-%d/%d" % (f, t, size) for f, t in ((10, 19), (size - 7, size - 1), (size - 3, size - 1))]
        assert [p["Content-Type"] for p in parts] == ["application/octet-stream"] * 3
        assert b[10:20] in r.content and r.content.count(b[-3:]) >= 2
        r = get("bytes=100-199")
        assert r.content == b[100:200] and r.headers["Content-Range"] == "bytes 100-199/%d" % size and r.headers["Content-Length"] == "100"
        assert get("bytes=%d-" % (size - 50)).content == b[-50:]
        assert get("bytes=-1").content == b[-1:]
        assert get("bytes=0-99999999999").content == b
        assert get("bytes=0-9223372036854775807").content == b
        assert get("bytes=5-9", **{"If-Range": '"%s"' % d}).content == b[5:10]
        assert get("bytes=5-9", want=200, **{"If-Range": '"other"'}).content == b
        for spec in ("bytes=%d-" % size, "bytes=%d-%d" % (size, size + 5), "bytes=9-3", "bytes=x-y"):
            r = get(spec, want=416)
            assert r.headers["Content-Type"] == "application/json" and r.json()["errors"], "416 has the specification's body as well"
        r = registry.blob(repo, d, want=304, headers={"If-None-Match": '"none", "%s"' % d})
        assert not r.content and r.headers["ETag"] == '"%s"' % d
        r = registry.blob(repo, d, headers={"Accept-Encoding": "zstd, gzip, deflate"})
        assert r.content == b and "Content-Encoding" not in r.headers


def test_early_close(proxy, agent):
    """A client that closes early is normal: the next gets everything."""
    repo, b = unique("test/early"), noise(6 << 20, "early")
    proxy.push_blob(repo, b)
    for registry in (agent, proxy):
        for _ in range(3):
            with registry.blob(repo, sha256(b), stream=True) as r:
                assert len(r.raw.read(1000)) == 1000
        assert registry.blob(repo, sha256(b)).content == b


def test_accept_in_many_lines(proxy, agent):
    """docker sends several Accept lines; the stored type comes back whatever they are, and the body of a HEAD is empty."""
    repo, image = unique("test/accept"), small_image()
    proxy.push_image(repo, "v1", image)
    for registry in (proxy, agent):
        for ref in ("v1", image.digest):
            r = registry.s.get("%s%s/manifests/%s" % (registry.base, repo, ref), headers={"Accept": "application/json"}, timeout=30)
            c, headers = registry.connection()
            for method, body in (("GET", image.manifest), ("HEAD", b"")):
                c.putrequest(method, "/v2/%s/manifests/%s" % (repo, ref))
                for kind in ("application/json", OCI_INDEX, OCI_MANIFEST, "*/*"):
                    c.putheader("Accept", kind)
                for name, value in headers.items():
                    c.putheader(name, value)
                c.endheaders()
                r2 = c.getresponse()
                assert r2.status == r.status_code == 200 and r2.read() == body
                for h in ("Content-Type", "Content-Length", "Docker-Content-Digest", "ETag"):
                    assert r2.getheader(h) == r.headers[h], h
            c.close()
            assert r.headers["Content-Type"] == OCI_MANIFEST


def test_deletes(proxy, agents):
    """Of a tag: the tag alone; of a digest: the manifest and all its tags. A deleted tag is 404 at every agent at once."""
    repo, image, other = unique("test/deletes"), small_image(), small_image()
    for tag in ("a", "b", "c"):
        proxy.push_image(repo, tag, image)
    proxy.push_image(repo, "other", other)
    for a in agents:
        a.manifest(repo, "a"), a.manifest(repo, "b"), a.manifest(repo, image.digest)
    proxy.request("DELETE", "%s/manifests/a" % repo, want=202)
    for registry in [proxy] + agents:
        assert error_code(registry.manifest(repo, "a", want=404)) == "MANIFEST_UNKNOWN"
        assert registry.manifest(repo, "b").content == registry.manifest(repo, image.digest).content == image.manifest
    proxy.request("DELETE", "%s/manifests/a" % repo, want=404)
    proxy.request("DELETE", "%s/manifests/%s" % (repo, image.digest), want=202)
    proxy.manifest(repo, image.digest, want=404)
    for registry in [proxy] + agents:
        registry.manifest(repo, "b", want=404), registry.manifest(repo, "c", want=404)
        assert registry.tags(repo)["tags"] == ["other"]
    proxy.request("DELETE", "%s/manifests/%s" % (repo, image.digest), want=404)


def test_referrers(proxy, agent):
    """By pages, by type, after deletes, of nothing, and of what a client listed under the tag schema."""
    repo, subject = unique("test/referrers"), small_image()
    assert referrers(proxy, repo, subject.digest) == ([], 1), "of an unknown digest in an unknown repository"
    proxy.push_image(repo, "v1", subject)
    proxy.push_blob(repo, b"{}")
    made = {}
    for n in range(230):
        raw = artifact_of(subject, "application/x-odd" if n % 2 else "application/x-even", n)
        r = proxy.push_manifest(repo, sha256(raw), OCI_MANIFEST, raw)
        assert r.headers["OCI-Subject"] == subject.digest
        made[sha256(raw)] = raw
    for registry in (proxy, agent):
        got, pages = referrers(registry, repo, subject.digest)
        assert pages > 1 and [d["digest"] for d in got] == sorted(made) and len(got) == 230
        assert all(d["size"] == len(made[d["digest"]]) and d["annotations"]["n"] for d in got)
        got, _ = referrers(registry, repo, subject.digest, artifactType="application/x-odd")
        assert len(got) == 115 and {d["artifactType"] for d in got} == {"application/x-odd"}
    gone = sorted(made)[::10]
    for d in gone:
        proxy.request("DELETE", "%s/manifests/%s" % (repo, d), want=202)
    listed = artifact_of(small_image(), "application/x-listed", 0)  # its own subject is another
    proxy.push_manifest(repo, sha256(listed), OCI_MANIFEST, listed)
    tag = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
        {"mediaType": OCI_MANIFEST, "digest": sha256(listed), "size": len(listed), "artifactType": "application/x-listed"}]}).encode()
    proxy.push_manifest(repo, subject.digest.replace(":", "-"), OCI_INDEX, tag)
    for registry in (proxy, agent):
        got, _ = referrers(registry, repo, subject.digest)
        assert {d["digest"] for d in got} == (set(made) - set(gone)) | {sha256(listed)}
        got, _ = referrers(registry, repo, subject.digest, artifactType="application/x-listed")
        assert [d["digest"] for d in got] == [sha256(listed)]
        r = registry.request("GET", "%s/referrers/sha256:short" % repo, want=400)
        assert error_code(r) == "DIGEST_INVALID"


def test_lists_in_pages(proxy, agent):
    """n, last and Link, of tags and of the catalog."""
    repo, image = unique("test/pages"), small_image()
    proxy.push_image(repo, "t00", image)
    tags = ["T", "_x"] + ["t%02d" % n for n in range(25)]
    for t in tags:
        proxy.push_manifest(repo, t, image.media_type, image.manifest)
    for registry in (proxy, agent):
        got, path = [], "%s/tags/list?n=10" % repo
        while path:
            r = registry.request("GET", path, want=200)
            assert r.json()["name"] == repo and len(r.json()["tags"]) <= 10
            got += r.json()["tags"]
            link = r.links.get("next", {}).get("url")
            assert link is None or link.startswith("/v2/")
            path = link.split("/v2/", 1)[1] if link else None
        assert got == sorted(tags)
        assert registry.request("GET", "%s/tags/list?n=0" % repo, want=200).json()["tags"] == []
        assert registry.request("GET", "%s/tags/list?last=t23" % repo, want=200).json()["tags"] == ["t24"]
        assert registry.request("GET", "%s/tags/list?last=zzz" % repo, want=200).json()["tags"] == []
        for n in ("-1", "x"):
            assert error_code(registry.request("GET", "%s/tags/list?n=%s" % (repo, n), want=400)) == "PAGINATION_NUMBER_INVALID"
        if SECURE and registry is agent:
            continue  # a node of a secure cluster may not list what exists
        r = registry.request("GET", "_catalog?n=1&last=%s" % repo[:-1], want=200)
        assert r.json()["repositories"] == [repo]


def test_conditions_and_immutable_tags(proxy):
    """If-Match is compare-and-swap; a tag that the configuration makes immutable is 403 with the reason."""
    repo, one, two = unique("test/cas"), small_image(), small_image()
    proxy.push_image(repo, "v1", one)
    proxy.push_image(repo, two.digest, two)

    def put(repo, tag, image, want, **headers):
        headers = {k.replace("_", "-"): v for k, v in headers.items()}
        return proxy.request("PUT", "%s/manifests/%s" % (repo, tag), want=want, data=image.manifest, headers=dict(headers, **{"Content-Type": image.media_type}))

    r = put(repo, "v1", two, 412, If_Match='"%s"' % two.digest)
    assert error_code(r) == "PRECONDITION_FAILED" and proxy.manifest(repo, "v1").content == one.manifest
    put(repo, "v1", two, 201, If_Match='"%s"' % one.digest)
    put(repo, "v1", one, 412, If_None_Match="*")
    put(repo, "v1", one, 412, If_None_Match='"%s"' % two.digest)
    put(repo, two.digest, two, 412, If_None_Match="*")
    put(repo, "new", one, 412, If_Match="*")
    put(repo, "new", one, 201, If_None_Match="*")

    repo = unique("release/cas")
    for image in (one, two):
        for b in image.blobs.values():
            proxy.push_blob(repo, b)
    put(repo, "v1", one, 201)
    put(repo, "v1", one, 201)  # what it is already
    put(repo, "latest", one, 201)
    put(repo, "latest", two, 201)
    for r in (put(repo, "v1", two, 403), proxy.request("DELETE", "%s/manifests/v1" % repo, want=403), proxy.request("DELETE", "%s/manifests/%s" % (repo, one.digest), want=403)):
        assert error_code(r) == "DENIED" and "immutable" in r.json()["errors"][0]["message"], r.text
    assert proxy.manifest(repo, "v1").content == one.manifest


def test_agent_is_read_only_and_head_does_not_download(cluster, proxy):
    """Everything that writes is 405 UNSUPPORTED at an agent; HEAD answers from metadata."""
    component = cluster.agents[0]
    agent, repo, image = component.registry(), unique("test/readonly"), small_image()
    big = noise(6 << 20, repo)
    proxy.push_image(repo, "v1", image)
    proxy.push_blob(repo, big)
    for method, path in (("POST", "blobs/uploads/"), ("PATCH", "blobs/uploads/x"), ("PUT", "blobs/uploads/x"), ("DELETE", "blobs/uploads/x"), ("PUT", "manifests/v1"),
                         ("DELETE", "manifests/v1"), ("DELETE", "manifests/" + image.digest), ("DELETE", "blobs/" + sha256(big)), ("POST", "tags/list"), ("FROB", "tags/list")):
        r = agent.request(method, "%s/%s" % (repo, path), want=405)
        assert error_code(r) == "UNSUPPORTED", r.text

    def fetched():
        return {k: v for k, v in component.metrics().items() if k.startswith(("kraken_agent_blob", "kraken_agent_bytes", "kraken_agent_downloads"))}

    before = fetched()
    assert before
    for d, b in list(image.blobs.items()) + [(sha256(big), big)]:
        r = agent.request("HEAD", "%s/blobs/%s" % (repo, d), want=200)
        assert int(r.headers["Content-Length"]) == len(b) and r.headers["Docker-Content-Digest"] == d and r.headers["ETag"] == '"%s"' % d
    agent.request("HEAD", "%s/blobs/%s" % (repo, sha256(b"nobody has this")), want=404)
    assert fetched() == before


def test_index_is_returned_as_pushed(proxy, agent):
    """Bytes come back exactly, with odd white space, key order and unknown fields."""
    repo, images = unique("test/exact"), [small_image(), small_image(architecture="arm64")]
    for i in images:
        proxy.push_image(repo, i.digest, i)
    kind, raw = index_of(images)
    raw = b"  \n" + raw.replace(b"{", b'{ "x-unknown" : [1,\t2.50e1, "\\u00e9"] ,', 1) + b"\n\n"
    proxy.push_manifest(repo, "v1", kind, raw)
    for registry in (proxy, agent):
        for ref in ("v1", sha256(raw)):
            r = registry.manifest(repo, ref)
            assert r.content == raw and r.headers["Content-Type"] == kind
