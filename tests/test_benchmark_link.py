"""benchmarks.link: a short run, and a shard that does not start."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from benchmarks import link
from common.memory_bus import MemoryBroker, MemoryBus


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.link", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_short_run() -> None:
    ran = run("--count", "20")
    assert ran.stderr == ""
    assert ran.returncode in (0, 1), "a busy machine may not hold the ratio"
    found = [line.split() for line in ran.stdout.splitlines() if " mailbox " in line or " bus " in line]
    rows = [cells for cells in found if cells[0].isdigit()]
    assert [cells[3] for cells in rows] == ["mailbox", "bus"] * 2
    assert all(0 < float(cells[4]) <= float(cells[5]) for cells in rows)


def test_a_model_that_is_not_there_is_one_sentence() -> None:
    ran = run("--model", "models/missing", "--count", "20")
    assert ran.returncode == 1 and "FAILED: " in ran.stderr and "Traceback" not in ran.stderr


@pytest.mark.parametrize(("code", "why"), [("raise SystemExit(3)", "exit code 3"), ("input()", "not ready within 0 s")])
def test_a_shard_that_never_is_ready(code: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "SHARD_SECONDS", 0.3 if code == "input()" else 30.0)

    async def wait(process: subprocess.Popen[bytes]) -> None:
        bus = MemoryBus(MemoryBroker())
        await bus.connect()
        async with asyncio.timeout(20):
            await link.ready_shard(bus, process)

    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        with pytest.raises(RuntimeError, match=why):
            asyncio.run(wait(process))
        process.kill()
