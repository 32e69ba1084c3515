"""Docker images and cluster scenarios."""

import time

from utils import error_code, small_image, unique


def test_push_and_pull(proxy, agents):
    """A Docker schema 2 image goes in at the proxy and out at every agent."""
    repo, image = unique("test/docker"), small_image(docker=True)
    proxy.push_image(repo, "v1", image)
    for a in agents:
        a.check_image(repo, "v1", image)


def test_pull_after_losing_proxy(cluster, proxy, agents):
    """Agents don't need the proxy."""
    repo, image = unique("test/no-proxy"), small_image(docker=True)
    proxy.push_image(repo, "v1", image)
    cluster.proxy.stop()
    for a in agents:
        a.check_image(repo, "v1", image)


def test_agent_pull_and_refused_push(proxy, agent):
    """An agent serves by tag and digest, and refuses everything that writes."""
    repo, image = unique("test/agent"), small_image(docker=True)
    proxy.push_image(repo, "v1", image)
    agent.check_image(repo, "v1", image)
    agent.check_image(repo, image.digest, image)
    for method, path in (("POST", "blobs/uploads/"), ("PUT", "manifests/v1"), ("DELETE", "manifests/v1"), ("DELETE", "blobs/" + image.layers[0])):
        r = agent.request(method, "%s/%s" % (repo, path), want=405, data=b"")
        assert error_code(r) == "UNSUPPORTED"


def test_tag_list_scoped_by_repository(proxy):
    """Tags of a repository whose name is a prefix of another's don't mix."""
    base = unique("test/scope")
    image = small_image(docker=True)
    for repo, tag in ((base, "a"), (base + "/sub", "b"), (base + "-more", "c")):
        proxy.push_image(repo, tag, image)
    assert proxy.tags(base)["tags"] == ["a"]
    assert proxy.tags(base + "/sub")["tags"] == ["b"]
    assert proxy.tags(base + "-more")["tags"] == ["c"]


def test_catalog_without_duplicates(proxy):
    """Many tags, pages of two: every repository comes once."""
    base = unique("test/catalog")
    repos = sorted("%s/r%d" % (base, i) for i in range(5))
    image = small_image(docker=True)
    for repo in repos:
        for tag in ("v1", "v2"):
            proxy.push_image(repo, tag, image)
    seen, last = [], base
    while True:
        r = proxy.request("GET", "_catalog", want=200, params={"n": 2, "last": last})
        names = r.json()["repositories"]
        assert len(names) <= 2
        seen += names
        if not r.links.get("next"):
            break
        last = names[-1]
    assert [n for n in seen if n.startswith(base + "/")] == repos
    assert len(seen) == len(set(seen))


def test_high_availability_with_bucket_down(cluster, proxy, agents):
    """Bucket down: push, restart origins and build-index, pull. Bucket back: wait until everything is written back, wipe
    their disks, pull again."""
    repo, image = unique("test/ha"), small_image(docker=True)
    cluster.bucket.stop()
    proxy.push_image(repo, "v1", image)
    for c in cluster.origins + [cluster.build_index]:
        c.restart()
    agents[0].check_image(repo, "v1", image)

    cluster.bucket.start()
    cluster.wait_written_back(timeout=90)
    for c in cluster.origins + [cluster.build_index]:
        c.restart(wipe=True)
    deadline = time.monotonic() + 30
    while proxy.request("HEAD", "%s/manifests/v1" % repo).status_code == 503:
        assert time.monotonic() < deadline, "build-index is not restored after 30 s"
        time.sleep(0.2)
    proxy.check_image(repo, "v1", image)
    agents[1].check_image(repo, "v1", image)
    assert proxy.tags(repo)["tags"] == ["v1"]
