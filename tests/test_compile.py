"""Every kernel compiles for every target, fits its shared memory, and the hot ones keep to their registers."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.compiling import TARGETS, Compiled, compile_cases

MODULES = sorted(p.stem for p in (Path(__file__).parent / "kernel_cases").glob("*.py") if p.stem != "__init__")
ALL = [(module, target) for module in MODULES for target in TARGETS]


def _one_target(module: str, target: str) -> list[Compiled]:
    os.environ.pop("TRITON_INTERPRET", None)
    return compile_cases(module, target)


@pytest.fixture(scope="module")
def compiling(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], Future]]:
    # A process a (module, target), since Triton keeps its target for life; as many at once as there are cores.
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    with pool:
        wanted = [item.callspec.params for item in request.session.items if item.path == request.path]
        keys = [(params["module"], params["target"]) for params in wanted]
        yield {key: pool.submit(_one_target, *key) for key in keys}


@pytest.mark.parametrize(("module", "target"), ALL, ids=[f"{module}-{target}" for module, target in ALL])
def test_compiles(compiling: dict[tuple[str, str], Future], module: str, target: str) -> None:
    for kernel in compiling[module, target].result():
        assert kernel.shared <= kernel.limit, kernel
        assert kernel.waits and not kernel.races, kernel
        if kernel.hot:
            assert kernel.spilled == 0, kernel
