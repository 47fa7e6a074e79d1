"""What people do first, as a shell line and in Python with the openai SDK: both made from one body, both tested."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

QUESTION = [{"role": "user", "content": "What is 47 + 85?"}]
NUMBER = {"type": "integer", "minimum": 0, "maximum": 999}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": NUMBER, "b": NUMBER},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
SUM = {
    "type": "object",
    "properties": {"sum": NUMBER},
    "required": ["sum"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Sample:
    """`call`: the SDK's method, empty where it has none; `then`: what is done in Python with its `answer`."""

    name: str
    title: str
    says: str
    path: str
    body: dict[str, Any] = field(default_factory=dict)
    call: str = ""
    then: str = ""
    flags: str = ""  # of curl

    def request(self, model: str) -> dict[str, Any]:
        return {"model": model, **self.body} if self.body else {}

    def shell(self, base_url: str, model: str, *, key: bool = False) -> str:
        """`key`: the server asks for one, which is in the variable MOECULE_KEY."""
        head = f"curl {self.flags}{base_url}{self.path}"
        if key:
            head += ' \\\n  -H "authorization: Bearer $MOECULE_KEY"'
        if not self.body:
            return f"{head} -X POST"
        data = pretty(self.request(model), json.dumps).replace("'", "'\\''")
        return f"{head} \\\n  -H 'content-type: application/json' -d '{data}'"

    def python(self, base_url: str, model: str, *, key: bool = False) -> str:
        arguments = "".join(f"    {name}={pretty(value, _word, 1)},\n" for name, value in self.request(model).items())
        imports, word = "import openai", '"none"'
        if key:
            imports, word = "import os\n\nimport openai", 'os.environ["MOECULE_KEY"]'
        return (
            f'{imports}\n\nclient = openai.OpenAI(base_url="{base_url}/v1", api_key={word})\n'
            f"answer = client.{self.call}(\n{arguments})\n{textwrap.dedent(self.then).strip()}\n"
        )


def pretty(value: Any, word: Callable[[Any], str], depth: int = 0) -> str:
    """A value with line breaks where a line would be too long; `word` writes what is neither list nor object."""
    if isinstance(value, dict):
        opening, closing = "{", "}"
        parts = [f"{word(name)}: {pretty(inner, word, depth + 1)}" for name, inner in value.items()]
    elif isinstance(value, list):
        opening, closing = "[", "]"
        parts = [pretty(inner, word, depth + 1) for inner in value]
    else:
        return word(value)
    line = opening + ", ".join(parts) + closing
    if "\n" not in line and len(line) + 4 * depth <= WIDTH:
        return line
    pad = "    " * depth
    return f"{opening}\n" + "".join(f"{pad}    {part},\n" for part in parts)[:-2] + f"\n{pad}{closing}"


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


WIDTH = 72
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"

SAMPLES = (
    Sample(
        "ask", "Ask", "A question, and the whole answer at once.", CHAT,
        {"messages": QUESTION, "temperature": 0},
        "chat.completions.create",
        "print(answer.choices[0].message.content)",
    ),
    Sample(
        "stream", "Stream", "The answer as it comes. Models that reason stream `reasoning_content` first.", CHAT,
        {"messages": QUESTION, "temperature": 0, "stream": True},
        "chat.completions.create",
        """
        for chunk in answer:
            delta = chunk.choices[0].delta
            print(getattr(delta, "reasoning_content", None) or delta.content or "", end="", flush=True)
        """,
        flags="-N ",
    ),
    Sample(
        "cancel", "Cancel", "Close the connection: the worker stops within a step. In a shell: Ctrl-C.", TEXT,
        {"prompt": "Once upon a time", "max_tokens": 500, "stream": True},
        "completions.create",
        """
        for count, chunk in enumerate(answer):
            print(chunk.choices[0].text, end="", flush=True)
            if count == 9:
                answer.close()
                break
        """,
        flags="-N ",
    ),
    Sample(
        "json", "JSON by a schema", "The answer matches the schema; reasoning, if there is any, comes before it.", CHAT,
        {
            "messages": QUESTION,
            "temperature": 0,
            "max_tokens": 500,
            "response_format": {"type": "json_schema", "json_schema": {"name": "sum", "schema": SUM}},
        },
        "chat.completions.create",
        "print(answer.choices[0].message.content)",
    ),
    Sample(
        "tool", "Call a tool", "The model answers with the call; run it, and send its result as a message of role "
        "`tool`.", CHAT,
        {"messages": QUESTION, "temperature": 0, "max_tokens": 500, "tools": [ADD], "tool_choice": "required"},
        "chat.completions.create",
        """
        call = answer.choices[0].message.tool_calls[0]
        print(call.function.name, call.function.arguments)
        """,
    ),
    Sample(
        "score", "Score a text", "The logprob of each of its tokens; `max_tokens` 0: and nothing is written.", TEXT,
        {"prompt": "Once upon a time", "max_tokens": 0, "echo": True, "logprobs": 1},
        "completions.create",
        """
        scores = answer.choices[0].logprobs
        for token, logprob in zip(scores.tokens, scores.token_logprobs):
            print(repr(token), logprob)
        """,
    ),
    Sample(
        "respond", "Ask by the Responses API", "Text in, text out; nothing is kept, so send the whole conversation.",
        RESPONSES,
        {"input": "What is 47 + 85?", "temperature": 0},
        "responses.create",
        "print(answer.output_text)",
    ),
    Sample(
        "tokenize", "Count tokens", "What a text is for the model. `/detokenize` goes back.", "/tokenize",
        {"prompt": "What is 47 + 85?", "return_token_strs": True},
    ),
    Sample(
        "detokenize", "Text of token ids", "The text that tokens stand for.", "/detokenize", {"tokens": [3, 331, 273]},
    ),
    Sample(
        "forget", "Empty the prefix cache", "So that a measurement starts cold.", "/reset_prefix_cache",
    ),
)  # fmt: skip
