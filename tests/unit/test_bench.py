"""`./run bench` on the service alone: the peers are in no test."""

import subprocess
import sys

import pytest

from tests.harness import ROOT


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.service
def test_a_short_round_ends_in_a_table_with_every_job_delivered():
    one_round = ("--only", "postback", "--cases", "closed", "--rounds", "1", "--seconds", "0.2")

    done = bench("peers", *one_round)

    assert done.returncode == 0, done.stderr
    assert "\n| Postback | " in done.stdout
    assert "* Postback: " not in done.stdout  # none missing, refused, broken or repeated
