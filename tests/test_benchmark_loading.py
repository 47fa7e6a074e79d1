"""benchmarks.loading: its files hold what a published model's do, its ways load just that, and a short run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import loading
from common.model_config import ModelConfig
from common.random_weights import RandomWeights
from common.weight_files import weight_files
from tests.test_loading import assert_same, numbers, plain

LAYERS = {"num_hidden_layers": 2, "first_k_dense_replace": 0}
TINY = loading.shape_of("models/tiny")
SMALL = 56  # no multiple of 128


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def write(folder: Path, *, fp8: bool) -> dict[str, torch.Tensor]:
    loading.write(folder, TINY | LAYERS, "cpu", fp8=fp8)
    return {name: value for path in weight_files(folder) for name, value in load_file(path).items()}


def test_files_are_a_published_model_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "FILE_BYTES", 1 << 20)
    written = write(tmp_path / "bf16", fp8=False)
    assert len(weight_files(tmp_path / "bf16")) > 3
    theirs = load_file("models/tiny/model.safetensors")
    want = {name: value for name, value in theirs.items() if ".layers." not in name}
    for layer in range(2):  # theirs begin with a dense one
        want |= {
            name.replace("layers.1.", f"layers.{layer}."): value
            for name, value in theirs.items()
            if "layers.1." in name
        }
    assert {n: (v.shape, v.dtype) for n, v in written.items()} == {n: (v.shape, v.dtype) for n, v in want.items()}


@pytest.mark.parametrize(
    ("fp8", "experts_fp8"), [(False, False), (True, False), (False, True)], ids=["bf16", "fp8", "bf16 to fp8"]
)
def test_what_is_loaded_is_what_was_drawn(tmp_path: Path, fp8: bool, experts_fp8: bool) -> None:
    folder = tmp_path / "written"
    in_blocks = [name for name, value in write(folder, fp8=fp8).items() if value.dtype is torch.float8_e4m3fn]
    assert any("kv_b_proj" in name for name in in_blocks) is fp8 and not any("embed" in name for name in in_blocks)
    stacks, weights = loading.Way("", folder, experts_fp8).load("cpu")
    config = ModelConfig.load(folder)
    assert config.fp8 is fp8
    want_stacks, want = loading.load(config, RandomWeights(fp8=fp8), "cpu", experts_fp8)
    assert_same(numbers(config, weights), numbers(config, want))
    assert len(stacks) == 2
    for layer, stack in stacks.items():
        assert isinstance(stack.gate_up, torch.Tensor) is not (fp8 or experts_fp8)
        assert len(stack.down.data) == config.experts + config.shared_experts
        for part in ("gate_up", "down"):
            got, drawn = (plain(getattr(one, part)) for one in (stack, want_stacks[layer]))
            assert got.equal(drawn), (layer, part)


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"][2:]


@pytest.mark.parametrize("cold", [[], ["--cold"]], ids=["warm", "cold"])
def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], cold: list[str]) -> None:
    loading.main(["--shape", "models/tiny", "--turns", "2", "--folder", str(tmp_path), *cold])
    found = rows(capsys.readouterr().out)
    assert [row[0] for row in found] == ["bf16", "fp8", "bf16, experts to fp8"]
    sizes = [float(row[1]) for row in found]
    assert sizes[0] == sizes[2] > sizes[1] > sizes[0] / 2
    for _, _, alone, loaded, ratio in found:
        assert float(ratio.rstrip("%")) == pytest.approx(100 * float(loaded) / float(alone), rel=0.02, abs=1)
    assert not list(tmp_path.iterdir())


def test_a_way_that_cannot_be_loaded_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"moe_intermediate_size": SMALL}))
    loading.main(["--shape", str(tmp_path), "--layers", "1", "--turns", "1"])
    bf16, *others = rows(capsys.readouterr().out)
    assert bf16[4].endswith("%")
    assert [row[4] for row in others] == [
        f"experts in fp8 need a moe_intermediate_size that is a multiple of 128, not {SMALL}"
    ] * 2
