"""The tokenizer and the chat template do what transformers does with the same files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import ConfigError, InvalidRequest
from services.gateway.tokenizer import Tokenizer

TINY = Path("models/tiny")
CONVERSATIONS = [
    [{"role": "user", "content": "What is 47 + 85?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé, 世界 🦀\n"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nhm</think>\n\nHello"},
        {"role": "user", "content": "Bye"},
    ],
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tokenizer's files of models/tiny, to be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, tmp_path / name)
    return tmp_path


def with_template(folder: Path, template: str) -> Tokenizer:
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder)


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["question", "system", "turns"])
def test_chat_equals_transformers(messages: list[dict[str, str]]) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(TINY), Tokenizer(TINY)
    text = ours.render(messages, {})
    assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(text) == list(expected)


def test_a_plain_prompt_begins_as_the_tokenizer_says() -> None:
    from transformers import AutoTokenizer

    assert Tokenizer(TINY).encode("Once upon") == AutoTokenizer.from_pretrained(TINY)("Once upon").input_ids
    assert Tokenizer(TINY).encode("Once upon")[0] == 0


def test_a_template_in_tokenizer_config_and_a_token_as_an_object(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ bos_token }}|{{ x }}"}]
    config = {"bos_token": {"content": "<s>", "special": True}, "chat_template": named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(folder).render([], {"x": 7}) == "<s>|7"


def test_without_a_template_chat_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InvalidRequest, match="no chat template"):
        Tokenizer(folder).render([], {})


def test_a_template_that_refuses_says_why(folder: Path) -> None:
    tokenizer = with_template(folder, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        tokenizer.render([], {})


def test_a_template_cannot_leave_its_sandbox(folder: Path) -> None:
    tokenizer = with_template(folder, "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InvalidRequest, match="unsafe"):
        tokenizer.render([], {})


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("chat_template.jinja", "{% if %}", "chat template is malformed"),
    ],
)
def test_a_broken_file_is_named(folder: Path, name: str, text: str | None, says: str) -> None:
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(ConfigError, match=says):
        Tokenizer(folder)


def test_the_gateway_never_imports_torch() -> None:
    code = "import sys, services.gateway.actor as _; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
