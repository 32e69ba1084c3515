"""OCI image support through the whole pipeline: proxy, origins, build-index, tracker, agents."""

import pytest

from components import SECURE
from utils import ACCEPT, DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, error_code, index_of, sha256, small_image, unique


@pytest.mark.parametrize("accept", [
    OCI_MANIFEST,
    OCI_INDEX + ", " + OCI_MANIFEST,
    ACCEPT,
    DOCKER_MANIFEST + ", application/json",
    "*/*",
    None,
])
def test_oci_manifest_accept_headers(proxy, agent, accept):
    """The stored media type is returned at proxy and agent, whatever list of OCI or Docker types the client accepts."""
    repo, image = unique("test/oci-accept"), small_image()
    proxy.push_image(repo, "v1", image)
    for registry in (proxy, agent):
        for ref in ("v1", image.digest):
            r = registry.manifest(repo, ref, accept=accept)
            assert r.headers["Content-Type"] == OCI_MANIFEST
            assert r.content == image.manifest
            head = registry.request("HEAD", "%s/manifests/%s" % (repo, ref), want=200, headers={"Accept": accept} if accept else {})
            assert head.headers["Content-Type"] == OCI_MANIFEST
            assert head.headers["Docker-Content-Digest"] == image.digest
            assert int(head.headers["Content-Length"]) == len(image.manifest)


def test_oci_compatible_push_pull(proxy, agents):
    """What is pushed to the proxy is pulled, byte for byte, from every agent and from the proxy; a manifest without the
    optional mediaType is known by its content."""
    for image in (small_image(), small_image(media_type=False), small_image(docker=True)):
        repo = unique("test/oci-push-pull")
        r = proxy.push_image(repo, "v1", image)
        assert r.headers["Docker-Content-Digest"] == image.digest
        for registry in [proxy] + agents:
            registry.check_image(repo, "v1", image)
            registry.check_image(repo, image.digest, image)


@pytest.mark.parametrize("docker", [False, True])
def test_oci_manifest_list_compatibility(proxy, agent, docker):
    """An index (or a Docker manifest list) of two platforms is stored and returned as pushed; one that names a missing
    manifest is refused and nothing of it stays."""
    repo = unique("test/oci-index")
    images = [small_image(architecture=a, docker=docker) for a in ("amd64", "arm64")]
    kind, raw = index_of(images, docker)
    assert kind == (DOCKER_LIST if docker else OCI_INDEX)
    r = proxy.push_manifest(repo, "multi", kind, raw, want=404)
    assert error_code(r) == "MANIFEST_BLOB_UNKNOWN"
    assert images[0].digest in r.text
    proxy.manifest(repo, "multi", want=404)
    for i in images:
        for b in i.blobs.values():
            proxy.push_blob(repo, b)
        proxy.push_manifest(repo, i.digest, i.media_type, i.manifest)
    proxy.push_manifest(repo, "multi", kind, raw)
    for registry in (proxy, agent):
        r = registry.manifest(repo, "multi")
        assert r.content == raw and r.headers["Content-Type"] == kind
        for i in images:
            registry.check_image(repo, i.digest, i)


def test_oci_blob_retrieval(proxy, agent):
    """Blobs are served whole and by range; HEAD has the size; unknown and malformed digests get the specification's errors."""
    repo, image = unique("test/oci-blob"), small_image()
    proxy.push_image(repo, "v1", image)
    layer = image.layers[-1]
    content = image.blobs[layer]
    for registry in (agent, proxy):
        head = registry.request("HEAD", "%s/blobs/%s" % (repo, layer), want=200)
        assert int(head.headers["Content-Length"]) == len(content)
        assert registry.blob(repo, layer).content == content
        for header, want in (("bytes=0-99", content[:100]), ("bytes=1000-", content[1000:]), ("bytes=-7", content[-7:])):
            r = registry.blob(repo, layer, want=206, headers={"Range": header})
            assert r.content == want
        r = registry.blob(repo, layer, want=416, headers={"Range": "bytes=%d-" % (len(content) + 1)})
        assert error_code(r) == "RANGE_INVALID" and r.headers["Content-Range"] == "bytes */%d" % len(content)
        assert error_code(registry.blob(repo, sha256(b"nobody has this"), want=404)) == "BLOB_UNKNOWN"
        assert error_code(registry.blob(repo, "sha256:short", want=400)) == "DIGEST_INVALID"


def test_oci_catalog_compatibility(proxy, agent):
    """A repository is in the catalog once it has an image, once. In a secure cluster a node may not list what exists."""
    repo = unique("test/oci-catalog")
    assert repo not in proxy.catalog()
    proxy.push_image(repo, "v1", small_image())
    proxy.push_image(repo, "v2", small_image())
    assert proxy.catalog().count(repo) == 1
    if SECURE:
        assert error_code(agent.request("GET", "_catalog", want=403)) == "DENIED"
    else:
        assert agent.catalog().count(repo) == 1


def test_oci_tags_list(proxy, agent):
    """Tags are listed sorted, with the repository's name; an unknown repository is 404."""
    repo, image = unique("test/oci-tags"), small_image()
    for tag in ("v2", "latest", "v1"):
        proxy.push_image(repo, tag, image)
    for registry in (proxy, agent):
        assert registry.tags(repo) == {"name": repo, "tags": ["latest", "v1", "v2"]}
        r = registry.request("GET", "%s/tags/list" % unique("test/none"), want=404)
        assert error_code(r) == "NAME_UNKNOWN"


def test_oci_high_availability_with_restart(cluster, proxy, agents):
    """Push, restart origins, build-index, tracker and proxy, and pull what an agent has never seen."""
    repo, image = unique("test/oci-ha"), small_image()
    proxy.push_image(repo, "v1", image)
    for c in cluster.origins + [cluster.build_index, cluster.tracker, cluster.proxy]:
        c.restart()
    agents[0].check_image(repo, "v1", image)
    agents[1].check_image(repo, image.digest, image)
    proxy.check_image(repo, "v1", image)
