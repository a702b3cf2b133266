"""The demo with Dask, and that it fails aloud. What it shows is in test_docs.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT

pytestmark = pytest.mark.service


def run_demo(directory: Path, code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code that has `demo` at hand, with `directory` for its temporary files."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; from web import demo; {code}"],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(directory)} | env,
        capture_output=True,
        text=True,
        timeout=25,
        check=False,
    )


@pytest.mark.slow
def test_the_demo_brings_a_dask_cluster_if_there_is_none(tmp_path):
    pytest.importorskip("distributed", reason="pip install -r requirements-dask.txt")

    done = run_demo(tmp_path, "demo.main()", EXECUTOR="dask")

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("A Dask scheduler listens on tcp://127.0.0.1:")
    assert "The job is delivered." in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_service_that_refuses_to_start_fails_the_demo_with_its_reason(tmp_path):
    done = run_demo(tmp_path, "demo.main()", MAX_RUNNING="many")

    assert done.returncode == 1
    assert "MAX_RUNNING='many': expected a whole number" in done.stderr
    assert "The service ended with status 78 before it listened." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_loop_that_is_not_whole_ends_the_service_and_leaves_no_files(tmp_path):
    broken = "demo.PAYLOAD_PATH = demo.ROOT / 'LICENSE'; demo.main()"

    done = run_demo(tmp_path, broken)

    assert done.returncode == 1
    [url] = re.findall(r"listens on (http://\S+),", done.stdout)
    assert f"{url}/process answered 400" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert run_demo(tmp_path, f"demo.call({url + '/livez'!r})").stderr.startswith(url)
