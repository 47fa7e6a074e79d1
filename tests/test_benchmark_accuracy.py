"""benchmarks.accuracy --fp8: the copy of models/tiny says nearly what models/tiny says."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.accuracy import TINY, write_fp8
from common.model_config import ModelConfig
from tests.test_model import error_ratio, open_model, whole


def test_the_copy_in_fp8_is_the_same_model(tmp_path: Path) -> None:
    folder = write_fp8(tmp_path / "tiny")
    assert ModelConfig.load(folder).fp8 and not ModelConfig.load(TINY).fp8
    assert {path.name for path in folder.iterdir()} == {path.name for path in TINY.iterdir()}
    tokens = torch.arange(300, 360)
    got, want = (whole(open_model(one), tokens) for one in (folder, TINY))
    assert 0 < error_ratio(got, want) < 0.2
    assert (got.argmax(1) == want.argmax(1)).float().mean() > 0.8
