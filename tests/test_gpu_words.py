"""What is said where a GPU is missing, or too small."""

from __future__ import annotations

import pytest
import torch

from common.device import fitting, why_no_gpu
from common.errors import ConfigError
from common.settings import Settings
from kernels.target import _describe
from services.colocated.actor import ColocatedWorker


def test_what_does_not_fit_ends_the_start_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 * 10**8, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 31 * 10**9)

    @fitting()
    def load() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"of its 80\.0 GB this process holds 31\.0, and 0\.5 are free .*nvidia-smi"
        ):
            load()


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is built for CUDA")
def test_a_gpu_that_is_not_found_names_the_build() -> None:
    assert why_no_gpu().startswith(f"PyTorch {torch.__version__} is built for the CPU: ")


@pytest.mark.parametrize("link", ["bus", "mailbox"])
def test_a_worker_with_its_own_experts_has_no_link(link: str) -> None:
    worker = ColocatedWorker.__new__(ColocatedWorker)
    worker.settings = Settings(link=link)
    with pytest.raises(ConfigError, match=f"MOECULE_LINK is {link}: services.colocated has its experts in its own"):
        worker._open_links()


def test_a_gpu_without_kernels_ends_the_start_with_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"no kernels for a GPU of sm_80: known are sm_90"):
        _describe("sm_80")
