"""What is asked of a worker compiles nothing while it serves: every kernel that is launched was rehearsed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def printed(*command: str) -> object:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    where = Path(__file__).parent.parent
    ran = subprocess.run(
        [sys.executable, "-m", *command], cwd=where, env=env, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


# R1's experts alone are 11 GB of address space a layer: `python -m tests.prefill_sizes r1 4` by hand.
@pytest.mark.parametrize("shape", ["v2-lite"])
def test_no_size_of_prefill_launches_a_kernel_that_was_not_rehearsed(shape: str) -> None:
    assert printed("tests.prefill_sizes", shape, "2") == {}


@pytest.mark.parametrize("shape", ["v2-lite"])  # the same by hand: `python -m tests.worker_kinds r1 4`
def test_no_pass_of_prompts_in_a_worker_launches_a_kernel_that_was_not_compiled_ahead(shape: str) -> None:
    assert printed("tests.worker_kinds", shape, "2") == {}


def test_nothing_that_one_request_asks_for_launches_a_kernel_that_was_not_rehearsed() -> None:
    assert printed("tests.sampled_kinds") == {}
