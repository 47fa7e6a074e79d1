"""A chat's messages and what the template makes of them, where that is more than the messages' texts."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common.errors import InvalidRequest
from common.settings import Settings
from services.gateway.conversation import render
from services.gateway.protocol import ChatBody
from services.gateway.tokenizer import Tokenizer
from tests.api_front import QUESTION, TOKENIZER, Front, make_front

TINY = Path("models/tiny")
LOOP = "{% for m in messages %}<{{ m.role }}>CONTENT{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
TEMPLATES = {
    "kept": LOOP.replace("CONTENT", "{{ m.content }};"),
    "trimmed": LOOP.replace("CONTENT", "{{ m.content | trim }};"),
    "trimmed before": LOOP.replace("CONTENT", "{{ m.content.lstrip() }}"),
}
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]


def body(**fields: Any) -> ChatBody:
    return msgspec.convert({"model": "tiny", "messages": QUESTION} | fields, ChatBody)


def with_template(folder: Path, template: str) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / name)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    async for one in make_front(Settings(port=0, drain_seconds=0.1)):
        yield one


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("content", ["It is", "It is ", "\n It is\n", "It is 🦀"])
def test_continuing_a_message_is_as_transformers_does_it(tmp_path: Path, template: str, content: str) -> None:
    from transformers import AutoTokenizer

    folder = with_template(tmp_path, template)
    messages = [*QUESTION, {"role": "assistant", "content": content}]
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert render(body(messages=messages, continue_final_message=True), Tokenizer(folder)).text == expected


def test_a_template_that_leaves_the_final_message_out(tmp_path: Path) -> None:
    tokenizer = Tokenizer(with_template(tmp_path, "{{ messages[0].content }}"))
    messages = [*QUESTION, {"role": "assistant", "content": "It is"}]
    with pytest.raises(InvalidRequest, match="leaves the final message out") as refused:
        render(body(messages=messages, continue_final_message=True), tokenizer)
    assert refused.value.param == "continue_final_message"


@pytest.mark.parametrize(
    ("content", "reasoning"),
    [("<think>\nhm", True), ("<think>\n", True), ("<think>hm</think>It is", False), ("It is", False)],
)
def test_reasoning_may_be_continued(tmp_path: Path, content: str, reasoning: bool) -> None:
    tokenizer = Tokenizer(with_template(tmp_path, TEMPLATES["kept"]))
    messages = [*QUESTION, {"role": "assistant", "content": content}]
    prompt = render(body(messages=messages, continue_final_message=True), tokenizer)
    assert (prompt.text[-len(content) :], prompt.reasoning) == (content, reasoning)


def test_a_tag_that_the_user_writes_begins_no_reasoning() -> None:
    messages = [{"role": "user", "content": "What does <think> mean?"}]
    assert render(body(messages=messages), TOKENIZER).reasoning
    assert not render(body(messages=messages, add_generation_prompt=False), TOKENIZER).reasoning


async def test_reasoning_that_is_continued_is_split_from_the_answer(front: Front) -> None:
    front.says(" more</think>\n\nIt is 132.")
    reply = await front.post(
        "/v1/chat/completions",
        messages=[*QUESTION, {"role": "assistant", "content": "<think>\n7+5"}],
        continue_final_message=True,
    )
    message = reply.json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (" more", "It is 132.")
    assert bytes(b"".join(map(TOKENIZER.token_bytes, front.sent.prompt))).endswith(b"<think>\n7+5")


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, "True None x"),
        ({"add_generation_prompt": False}, "False None x"),
        ({"chat_template_kwargs": {"add_generation_prompt": False, "x": "y"}}, "False None y"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}, "add_generation_prompt": True}, "True None x"),
        ({"reasoning_effort": "high"}, "True high x"),
        ({"chat_template_kwargs": {"reasoning_effort": "low"}, "reasoning_effort": "high"}, "True high x"),
    ],
)
def test_a_field_goes_before_its_like_in_chat_template_kwargs(tmp_path: Path, fields: dict, shown: str) -> None:
    template = "{{ add_generation_prompt }} {{ reasoning_effort or None }} {{ x or 'x' }}"
    assert render(body(**fields), Tokenizer(with_template(tmp_path, template))).text == shown


async def test_a_history_with_tool_calls_is_rendered(front: Front) -> None:
    """The template of models/tiny knows no tools: they are written into the messages."""
    history = [
        *QUESTION,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "132"},
    ]
    reply = await front.post("/v1/chat/completions", messages=history)
    assert reply.status_code == 200, reply.text
    prompt = b"".join(map(TOKENIZER.token_bytes, front.sent.prompt)).decode()
    assert '"name": "add"' in prompt
    assert "132" in prompt


def test_tools_reach_a_template_that_describes_them(tmp_path: Path) -> None:
    template = (
        "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ {'name': c.function.name, 'arguments': c.function.arguments} "
        "| tojson }}</tool_call>{% endfor %};{% endfor %}"
    )
    tokenizer = Tokenizer(with_template(tmp_path, template))
    history = [
        *QUESTION,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "132"},
    ]
    text = render(body(messages=history, tools=TOOLS), tokenizer).text
    assert msgspec.json.decode(text.split("\n")[0]) == TOOLS[0]
    assert '{"name": "add", "arguments": {"a": 1}}' in text, "an object, not its text"
    assert "tool:132" in text
