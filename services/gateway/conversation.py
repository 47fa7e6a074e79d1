"""A chat's body to the text that the checkpoint's template makes of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from common.errors import InvalidRequest
from services.gateway.protocol import ChatBody, Tool
from services.gateway.reasoning import CLOSE, OPEN
from services.gateway.tokenizer import Tokenizer
from services.gateway.tool_template import ToolFormat, template_messages, template_tools, tool_format
from services.gateway.tools import Syntax, ToolChoice, check_tools

_MARK = "\u2063\u2060continued\u2060\u2063"  # where a continued message ends in the rendered text


@dataclass(frozen=True)
class ToolUse:
    """How this model writes calls, and the names of the tools that a request offers."""

    syntax: Syntax
    names: frozenset[str]


@dataclass(frozen=True)
class ChatPrompt:
    """`reasoning`: the text ends inside <think>."""

    text: str
    reasoning: bool
    tools: ToolUse | None = None


def render(body: ChatBody, tokenizer: Tokenizer) -> ChatPrompt:
    """Raises InvalidRequest for what the template refuses."""
    form, offered = format_of(tokenizer), offered_tools(body)
    check_tools(body.tools or (), choice_of(body))
    tools = ToolUse(form.syntax, frozenset(tool.function.name for tool in offered)) if offered else None
    messages, values = template_messages(body.messages, offered, form), template_values(body, form)
    if not body.continue_final_message:
        text = tokenizer.render(messages, values)
        return ChatPrompt(text, text.rstrip().endswith(OPEN), tools)
    last = messages[-1]["content"] or ""
    messages[-1]["content"] = f"{last}{_MARK} "
    text = _cut(tokenizer.render(messages, values))
    return ChatPrompt(text, last.rfind(OPEN) > last.rfind(CLOSE) or text.rstrip().endswith(OPEN), tools)


def choice_of(body: ChatBody) -> ToolChoice:
    return body.tool_choice or "auto"


def offered_tools(body: ChatBody) -> list[Tool]:
    return [] if choice_of(body) == "none" else body.tools or []


def template_values(body: ChatBody, form: ToolFormat) -> dict[str, Any]:
    """What a template is given beside the messages; a field of its own goes before its like in chat_template_kwargs."""
    values = {"tools": None, **(body.chat_template_kwargs or {})}
    if body.continue_final_message:
        values["add_generation_prompt"] = False
    elif body.add_generation_prompt is not None:
        values["add_generation_prompt"] = body.add_generation_prompt
    if body.reasoning_effort is not None:
        values["reasoning_effort"] = body.reasoning_effort
    if form.described and (offered := offered_tools(body)):
        values["tools"] = template_tools(offered)
    return values


@functools.lru_cache(maxsize=4)
def format_of(tokenizer: Tokenizer) -> ToolFormat:
    return tool_format(tokenizer.render)


def _cut(text: str) -> str:
    """Up to the end of the message that is continued; a template that trims messages trims this one too."""
    before, mark, after = text.rpartition(_MARK)
    if not mark:
        raise InvalidRequest("the chat template leaves the final message out", "continue_final_message")
    return before if after.startswith(" ") else before.rstrip()
