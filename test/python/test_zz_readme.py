"""The commands of README.md work, top to bottom. It comes last, because it ends the dev cluster."""

import os
import re

import pytest

from components import DIR, ROOT, run


pytestmark = pytest.mark.plain("it starts clusters by the README's own commands")


def blocks():
    with open(os.path.join(os.path.dirname(__file__), "README.md")) as f:
        return re.findall(r"^```bash\n(.*?)^```$", f.read(), re.M | re.S)


def test_readme_commands():
    """Every bash block, each from the project's root."""
    commands = blocks()
    assert len(commands) >= 7
    if os.path.exists(os.path.join(DIR, "cluster.json")):
        run("make", "stop-devcluster", cwd=ROOT)
    try:
        for c in commands:
            out = run("bash", "-euo", "pipefail", "-c", c, cwd=ROOT, timeout=600).stdout
            if "-m pytest" in c:
                assert " passed" in out
            if "go test" in c:
                assert "--- PASS: TestOCI" in out
    finally:
        if os.path.exists(os.path.join(DIR, "cluster.json")):
            run("make", "stop-devcluster", cwd=ROOT)
    assert not os.path.exists(os.path.join(DIR, "cluster.json"))
