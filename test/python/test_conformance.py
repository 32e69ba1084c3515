"""The official conformance suite of the distribution specification: whole at the proxy, its read-only mode at an agent."""

import os
import shutil

import pytest

from components import ROOT, SECURE, run
from conftest import TABLES
from utils import OCI_MANIFEST, index_of, sha256, small_image, unique

SUITE = os.path.join(ROOT, "bin", "tools", "conformance")
OUT = os.path.join(ROOT, "test", "conformance", "out", "secure" if SECURE else "")

# Everything that the suite can ask for, whatever its default for a version is. What it calls sparse has a test of its own.
ALL = {
    "API_" + k: "true" for k in (
        "PULL", "PUSH", "BLOBS_ATOMIC", "BLOBS_DELETE", "BLOBS_DIGEST_HEADER", "BLOBS_MOUNT_ANONYMOUS", "BLOBS_UPLOAD_CANCEL", "MANIFESTS_ATOMIC",
        "MANIFESTS_DELETE", "MANIFESTS_DIGEST_HEADER", "MANIFESTS_TAG_PARAM", "TAGS_ATOMIC", "TAGS_DELETE", "TAGS_LIST", "REFERRER")
}
ALL.update({
    "DATA_" + k: "true" for k in (
        "IMAGE", "INDEX", "INDEX_LIST", "ARTIFACT", "SUBJECT", "SUBJECT_MISSING", "ARTIFACT_LIST", "SUBJECT_LIST", "DATA_FIELD", "NONDISTRIBUTABLE",
        "CUSTOM_FIELDS", "NO_LAYERS", "EMPTY_BLOB", "SHA512")
})
# The read-only mode never looks at the digest header of what it was only told the name of, and then says that it is missing.
READ_ONLY = {
    "API_" + k: "false" for k in (
        "PUSH", "BLOBS_ATOMIC", "BLOBS_DELETE", "BLOBS_DIGEST_HEADER", "MANIFESTS_ATOMIC", "MANIFESTS_DELETE", "MANIFESTS_DIGEST_HEADER", "TAGS_ATOMIC", "TAGS_DELETE")
}
COLUMNS = ("Pass", "FAIL", "Error", "Skip", "Disabled", "Total")


@pytest.fixture(scope="module")
def table():
    """Collects the counts of each run, prints them at the end, and leaves them beside the suite's own reports."""
    rows = []
    yield rows
    lines = ["%-22s" % "conformance" + "".join("%10s" % c.lower() for c in COLUMNS)]
    lines += ["%-22s" % name + "".join("%10d" % counts[c] for c in COLUMNS) for name, counts in rows]
    text = "\n".join(lines) + "\n"
    os.makedirs(OUT, exist_ok=True)
    with open(os.path.join(OUT, "table.txt"), "w") as f:
        f.write(text)
    TABLES.append(text + "reports: %s/*/\n" % os.path.relpath(OUT, ROOT))


def conformance(table, name, addr, version, repo, settings, login=None):
    """Runs the suite, over TLS with a login where there is one; returns its counts, and its own words about what did not pass."""
    out = os.path.join(OUT, name)
    shutil.rmtree(out, ignore_errors=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith("OCI_")}
    env.update({"OCI_" + k: v for k, v in settings.items()})
    if login:
        env.update(OCI_TLS="enabled", OCI_USERNAME=login[0], OCI_PASSWORD=login[1])
    env.setdefault("OCI_TLS", "disabled")
    env.update(OCI_VERSION=version, OCI_REGISTRY=addr, OCI_REPO1=repo, OCI_REPO2=repo + "-2", OCI_RESULTS_DIR=out, OCI_LOG="error")
    p = run(SUITE, env=env, check=False, timeout=300)
    counts = {}
    for line in p.stdout[p.stdout.rindex("OCI Conformance Result"):].splitlines()[1:]:
        label, _, n = line.strip().partition(":")
        if label.rstrip(".") in COLUMNS:
            counts[label.rstrip(".")] = int(n)
    table.append((name, counts))
    report = p.stdout[:p.stdout.index("Configuration:")].splitlines()
    wrong = [line for line in report if line.lstrip().startswith("- ") or not line.endswith((": Pass", ": Disabled", "Test results"))]
    return counts, wrong


def whole(counts, wrong, disabled=0):
    assert counts["Pass"] > 0 and counts["Pass"] + disabled == counts["Total"], "%s\n%s" % (counts, "\n".join(wrong))


@pytest.mark.parametrize("version", ["1.0", "1.1", "dev"])
def test_conformance_of_the_proxy(cluster, table, version):
    """Pull, push, discovery and management, every switch on: nothing fails and nothing is left out for lack of support."""
    counts, wrong = conformance(table, "proxy-" + version, cluster.proxy.addr, version, unique("conformance"), dict(ALL, DATA_SPARSE="false"), cluster.login())
    whole(counts, wrong)


def test_conformance_of_sparse_content(cluster, table):
    """Manifests of content that was never pushed, in a repository that is configured for them."""
    counts, wrong = conformance(table, "proxy-sparse", cluster.proxy.addr, "dev", unique("lax"), dict(ALL, DATA_SPARSE="true"), cluster.login())
    whole(counts, wrong)


@pytest.mark.parametrize("version", ["1.0", "1.1", "dev"])
def test_conformance_of_an_agent(cluster, table, proxy, version):
    """The read-only mode, with content that came in through the proxy."""
    repo = unique("conformance-ro")
    images = [small_image(), small_image()]
    for i, image in enumerate(images):
        proxy.push_image(repo, "v%d" % i, image)
    kind, index = index_of(images)
    proxy.push_manifest(repo, "index", kind, index)
    artifact = artifact_of(images[0])
    proxy.push_blob(repo, b"{}")
    proxy.push_manifest(repo, sha256(artifact), OCI_MANIFEST, artifact)
    settings = dict(ALL, DATA_SPARSE="false", **READ_ONLY)
    settings.update({
        "RO_DATA_TAGS": "v0 v1 index",
        "RO_DATA_MANIFESTS": " ".join([i.digest for i in images] + [sha256(index), sha256(artifact)]),
        "RO_DATA_BLOBS": " ".join(d for i in images for d in i.blobs),
        "RO_DATA_REFERRERS": images[0].digest,
    })
    counts, wrong = conformance(table, "agent-" + version, cluster.agents[0].addr, version, repo, settings)
    whole(counts, wrong, disabled=counts["Disabled"])  # what writes
    for i, image in enumerate(images):
        cluster.agents[0].registry().check_image(repo, "v%d" % i, image)


def artifact_of(image):
    """An artifact without content of its own whose subject is an image."""
    empty = '{"mediaType":"application/vnd.oci.empty.v1+json","digest":"%s","size":2}' % sha256(b"{}")
    return ('{"schemaVersion":2,"mediaType":"%s","artifactType":"application/x-test","config":%s,"layers":[%s],"subject":{"mediaType":"%s","digest":"%s","size":%d}}' % (
        OCI_MANIFEST, empty, empty, image.media_type, image.digest, len(image.manifest))).encode()
