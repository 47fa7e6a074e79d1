"""Models of which there is only the shape: what benchmarks.shapes writes is what gateway and workers read."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.shapes import SHAPES, write_model
from common.model_config import ModelConfig
from services.gateway.detokenizer import Detokenizer
from services.gateway.tokenizer import Tokenizer
from services.gpu_worker.grammar import Grammars


@pytest.fixture(scope="module", params=sorted(SHAPES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(request.param, 4, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


def test_the_config_is_that_of_the_shape(folder: Path) -> None:
    assert ModelConfig.load(folder, "random").layers == 4


def test_every_id_of_the_vocabulary_has_a_text_of_its_own(folder: Path, tokenizer: Tokenizer) -> None:
    config = ModelConfig.load(folder, "random")
    assert len(tokenizer.pieces) == len(set(tokenizer.pieces)) == config.vocab and all(tokenizer.pieces)
    special = {*config.eos_ids, config.bos_id}
    assert all(len(tokenizer.pieces[i]) > 1 for i in special if i is not None), "no text contains them by chance"


def test_texts_come_back(tokenizer: Tokenizer) -> None:
    text = "Once upon a time, 47 + 85:\n \u00fcber \U0001f600 aaaa"
    tokens = tokenizer.encode(text)
    assert tokens[-1] == 0, "a word of the vocabulary is one token"
    detokenizer = Detokenizer(tokenizer.pieces)
    assert "".join(map(detokenizer.push, tokens)) + detokenizer.flush() == text


def test_workers_can_follow_grammars_over_it(folder: Path) -> None:
    grammars = Grammars(str(folder), ModelConfig.load(folder, "random"))
    assert grammars._tokenizer is not None, grammars._missing
    grammars.close()
