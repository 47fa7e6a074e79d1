"""Tool calls: what a client offers, how the model writes calls, and the grammar that holds it to them.

A request's way: `check_tools` -> `template_messages` and `template_tools` of tool_template.py -> the template ->
`tool_grammar` for the worker; the model's answer -> `ToolParser` of tool_parser.py -> `call_delta` or `collected`.

| syntax         | checkpoints                      | a call                                                           |
|----------------|----------------------------------|------------------------------------------------------------------|
| DEEPSEEK_V3    | DeepSeek V2.5, V3, V3-0324, R1   | `function<｜tool▁sep｜>NAME`, then the arguments in a json fence |
| DEEPSEEK_V31   | DeepSeek V3.1, V3.2-Exp          | `NAME<｜tool▁sep｜>ARGUMENTS`                                    |
| HERMES         | any other: the prompt teaches it | `<tool_call>{"name": NAME, "arguments": ARGUMENTS}</tool_call>`  |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from common.errors import InvalidRequest
from common.messages import Grammar
from services.gateway.protocol import CalledFunction, ChosenTool, Function, Tool

MAX_TOOLS = 128
MOST_DEPTH = 100  # of a JSON schema

# ---- what a client sends --------------------------------------------------------------------------------------------

ToolChoice = Literal["none", "auto", "required"] | ChosenTool


def check_tools(tools: Sequence[Tool], choice: ToolChoice) -> None:
    """What the types cannot say. Raises InvalidRequest."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"{len(tools)} tools are over the limit of {MAX_TOOLS}", "tools")
    names: set[str] = set()
    for i, tool in enumerate(tools):
        _check_function(tool.function, names, f"tools[{i}].function")
        names.add(tool.function.name)
    if isinstance(choice, ChosenTool) and choice.function.name not in names:
        raise InvalidRequest(f"no tool is named {choice.function.name!r}", "tool_choice.function.name")
    if choice == "required" and not tools:
        raise InvalidRequest("tool_choice is required and there are no tools: name some in tools", "tool_choice")


def _check_function(function: Function, names: Collection[str], param: str) -> None:
    if function.name in names:
        raise InvalidRequest(f"two tools are named {function.name!r}", f"{param}.name")
    if function.name.endswith("\n"):  # which `$` lets through
        raise InvalidRequest("the name ends in a newline", f"{param}.name")
    schema = parameters_of(function)
    if schema["type"] != "object":
        raise InvalidRequest("parameters must be the schema of an object (type: object)", f"{param}.parameters")
    if _deeper_than(MOST_DEPTH, schema):
        raise InvalidRequest(f"parameters are nested more than {MOST_DEPTH} deep", f"{param}.parameters")


def parameters_of(function: Function) -> dict[str, Any]:
    """The arguments' JSON schema; a function without `parameters` takes none."""
    if function.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object"} | function.parameters


def _deeper_than(depth: int, value: Any) -> bool:
    level = [value]
    for _ in range(depth):
        parents = [value for value in level if isinstance(value, (dict, list))]
        level = [child for value in parents for child in (value.values() if isinstance(value, dict) else value)]
    return bool(level)


# ---- how calls are written ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Syntax:
    """A call is `before_name` NAME `before_arguments` ARGUMENTS `after`; all calls stand between `begin` and `end`.

    Parts are written as they are. White space around them does not matter when they are read.
    """

    before_name: tuple[str, ...]
    before_arguments: tuple[str, ...]
    after: tuple[str, ...]
    begin: str = ""
    between: str = ""
    end: str = ""

    @property
    def call(self) -> str:
        """The marker that every call begins with."""
        return self.before_name[0]

    @property
    def markers(self) -> tuple[str, ...]:
        """The parts that a vocabulary may have as one token: the parser must see their text."""
        parts = (self.begin, self.end, *self.before_name, *self.before_arguments, *self.after)
        return tuple(part for part in parts if _is_marker(part))

    def write(self, calls: Iterable[CalledFunction]) -> str:
        return self.begin + self.between.join(map(self._write_call, calls)) + self.end

    def _write_call(self, call: CalledFunction) -> str:
        return "".join((*self.before_name, call.name, *self.before_arguments, call.arguments, *self.after))


_CALLS_BEGIN, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL_BEGIN, _CALL_END, _SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"

DEEPSEEK_V3 = Syntax(
    begin=_CALLS_BEGIN,
    before_name=(_CALL_BEGIN, "function", _SEP),
    before_arguments=("\n```json\n",),
    after=("\n```", _CALL_END),
    between="\n",
    end=_CALLS_END,
)
DEEPSEEK_V31 = Syntax(
    begin=_CALLS_BEGIN,
    before_name=(_CALL_BEGIN,),
    before_arguments=(_SEP,),
    after=(_CALL_END,),
    end=_CALLS_END,
)
HERMES = Syntax(
    before_name=("<tool_call>", "\n{", '"name"', ": ", '"'),
    before_arguments=('"', ", ", '"arguments"', ": "),
    after=("}\n", "</tool_call>"),
    between="\n",
)


def _is_marker(part: str) -> bool:
    return part.startswith("<") and part.endswith(">")


# ---- what the model is held to --------------------------------------------------------------------------------------

# Enough to indent with, and never so much that a model loses itself in it.
_JSON_OPTIONS = {"whitespace_pattern": r"[ \n]{1,12}"}


def tool_grammar(
    tools: Sequence[Tool],
    choice: ToolChoice,
    syntax: Syntax,
    token_id: Callable[[str], int | None],
    *,
    parallel: bool = True,
    after: int | None = None,
) -> Grammar | None:
    """What holds the model to `choice`, in llguidance's Lark; None where it is free.

    "required" is one call or more, a named function exactly one call of it; with "auto" the model is held to its
    calls where some tool is strict, and to one call where they may not be `parallel`. `token_id`: of a marker that
    the vocabulary has as one token. `after`: see Grammar.
    """
    free = choice == "auto"
    if choice == "none" or (free and parallel and not any(tool.function.strict for tool in tools)):
        return None
    functions = [tool.function for tool in tools]
    if isinstance(choice, ChosenTool):
        functions = [function for function in functions if function.name == choice.function.name]
        parallel = False
    rules = _call_rules(functions, syntax, token_id, strict_only=free)
    rules["more"] = _terms((syntax.between, syntax.call), token_id) + " inner"
    first = "call" if syntax.begin else "inner"
    rules["calls"] = " ".join(filter(None, (first, "more*" if parallel else "", _terms((syntax.end,), token_id))))
    opener = _terms((syntax.begin or syntax.call,), token_id)
    if not free:
        rules["start"] = f"{opener} calls"
    else:
        # A marker that is text has to be found in the text: the shortest that ends with it.
        lazy = "[lazy]" if opener.startswith('"') else ""
        rules |= {"start": "TEXT | opening calls", f"opening{lazy}": f"TEXT {opener}", "TEXT": "/(?s:.*)/"}
    return Grammar("lark", "".join(f"{name}: {rule}\n" for name, rule in rules.items()), after)


def _call_rules(
    functions: Sequence[Function], syntax: Syntax, token_id: Callable[[str], int | None], *, strict_only: bool
) -> dict[str, str]:
    """`call`, and `inner`: a call without its first marker."""
    names = [f"function{i}" for i in range(len(functions))]
    rules = {
        "call": _terms((syntax.call,), token_id) + " inner",
        "inner": f"({' | '.join(names)}) " + _terms(syntax.after, token_id),
    }
    for rule, function in zip(names, functions, strict=True):
        held = function.strict or not strict_only
        schema = (parameters_of(function) if held else {"type": "object"}) | {"x-guidance": _JSON_OPTIONS}
        head = _terms((*syntax.before_name[1:], function.name, *syntax.before_arguments), token_id)
        rules[rule] = f"{head} %json {json.dumps(schema)}"
    return rules


def _terms(parts: Iterable[str], token_id: Callable[[str], int | None]) -> str:
    """The parts in Lark: markers by their token, the text between them in quotes."""

    def is_token(part: str) -> bool:
        return _is_marker(part) and token_id(part) is not None

    terms: list[str] = []
    for are_tokens, group in groupby(filter(None, parts), key=is_token):
        if are_tokens:
            terms += [f"<[{token_id(part)}]>" for part in group]
        else:
            terms.append(json.dumps("".join(group), ensure_ascii=False))
    return " ".join(terms)
