"""A prompt of whatever length compiles nothing while it serves: every kernel that it launches was rehearsed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


# R1's experts alone are 11 GB of address space a layer: `python -m tests.prefill_sizes r1 4` by hand.
@pytest.mark.parametrize("shape", ["v2-lite"])
def test_no_size_of_prefill_launches_a_kernel_that_was_not_rehearsed(shape: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.prefill_sizes", shape, "2"]
    ran = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=env, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert json.loads(ran.stdout.splitlines()[-1]) == {}
