"""Every parameter of both bodies: two requests that differ in it alone, and what worker or client see of it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common.errors import ConfigError
from common.messages import Generate, Grammar, Sampling
from common.settings import Settings
from services.gateway.prepare import Defaults, generation_defaults
from services.gateway.protocol import ChatBody, CompletionBody
from tests.api_front import EOS, QUESTION, TOKENIZER, Front, ScoringWorker, make_front, own_logprob, text_tokens

PATHS = {CompletionBody: "/v1/completions", ChatBody: "/v1/chat/completions"}
PLAIN: dict[type, dict[str, Any]] = {
    CompletionBody: {"model": "tiny", "prompt": "Once", "seed": 7},
    ChatBody: {"model": "tiny", "messages": QUESTION, "seed": 7},
}
USER = 3  # the token <｜User｜>, which is special
SAID = [*text_tokens("no</think>one two"), USER, *text_tokens(" three"), EOS]
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds."}}
SCHEMA_TEXT = msgspec.json.encode(SCHEMA).decode()


@dataclass
class Seen:
    """What came of one request: its answer or the events of its stream, and what the worker was sent."""

    status: int
    sent: list[Generate]
    answer: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def choice(self) -> dict[str, Any]:
        return self.answer["choices"][0]

    @property
    def text(self) -> str:
        return self.choice["message"]["content"] if "message" in self.choice else self.choice["text"]

    @property
    def sampling(self) -> Sampling:
        return self.sent[0].sampling

    @property
    def prompt(self) -> str:
        return b"".join(map(TOKENIZER.token_bytes, self.sent[0].prompt)).decode()


View = Callable[[Seen], Any]


@dataclass(frozen=True)
class Case:
    """The parameter is `value` in one of two requests, and left out of the other; both have `beside`."""

    value: Any
    view: View
    without: Any
    having: Any
    beside: dict[str, Any] = field(default_factory=dict)
    plain: Any = None  # the value in the other request, where it cannot be left out


def sent(name: str, value: Any, *, without: Any, having: Any = None, **others: Any) -> Case:
    """The worker is sent it as Sampling.`name`."""
    having = value if having is None else having
    return Case(value, lambda seen: getattr(seen.sampling, name), without, having, **others)


def changes_nothing(value: Any) -> Case:
    """Taken, and without effect: what is sent and answered is the same."""

    def view(seen: Seen) -> Any:
        answer = {name: value for name, value in seen.answer.items() if name not in ("id", "created")}
        return answer, [msgspec.structs.replace(request, request_id="") for request in seen.sent]

    return Case(value, view, SAME, SAME)


def refused(value: Any) -> Case:
    return Case(value, lambda seen: (seen.status, seen.answer.get("error", {}).get("param")), (200, None), REFUSED)


def constrains(value: Any, kind: str, text: str) -> Case:
    return Case(value, lambda seen: seen.sampling.grammar, None, lambda after: Grammar(kind, text, after))


SAME, REFUSED = object(), object()
TEXT = "one two three"


def shared(text: str) -> dict[str, Case]:
    """Of both bodies. `text`: what they show of the stand-in's output."""
    return {
        "model": Case("other", lambda seen: seen.status, 200, 404, plain="tiny"),
        "stream": Case(True, lambda seen: len(seen.events) > 1, False, True),
        "stream_options": Case(
            {"include_usage": True}, lambda seen: seen.events[-1].get("usage") is None, True, False, {"stream": True}
        ),
        "max_tokens": sent("max_tokens", 5, without=50),
        "min_tokens": sent("min_tokens", 4, without=0),
        "temperature": sent("temperature", 0.25, without=0.7),
        "top_p": sent("top_p", 0.5, without=0.9),
        "top_k": sent("top_k", 11, without=40),
        "min_p": sent("min_p", 0.25, without=0.1),
        "presence_penalty": sent("presence_penalty", -0.5, without=0.0),
        "frequency_penalty": sent("frequency_penalty", 1.5, without=0.0),
        "repetition_penalty": sent("repetition_penalty", 1.25, without=1.1),
        "logit_bias": sent("logit_bias", {"9": -100, "5": 2.5}, without=(), having=((5, 2.5), (9, -100.0))),
        "seed": sent("seed", 8, without=7, plain=7),
        "n": Case(3, lambda seen: (len(seen.sent), len(seen.answer["choices"])), (1, 1), (3, 3)),
        "stop": Case(
            " three", lambda seen: (seen.text, seen.choice["stop_reason"]), (text, None), (text[:-6], " three")
        ),
        "stop_token_ids": sent("stop_token_ids", [9, 5], without=(), having=(9, 5)),
        "include_stop_str_in_output": Case(True, lambda seen: seen.text, text[:-6], text[:-3], {"stop": " th"}),
        "ignore_eos": sent("ignore_eos", True, without=False),
        "skip_special_tokens": Case(False, lambda seen: "<｜User｜>" in seen.text, False, True),
        "prompt_logprobs": sent("prompt_logprobs", 2, without=None),
        "return_token_ids": Case(True, lambda seen: seen.choice.get("token_ids"), None, SAID),
        "response_format": constrains(
            {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, "json_schema", SCHEMA_TEXT
        ),
        "structured_outputs": constrains({"regex": "a+"}, "regex", "a+"),
        "guided_json": constrains(SCHEMA, "json_schema", SCHEMA_TEXT),
        "guided_regex": constrains("[ab]{3}", "regex", "[ab]{3}"),
        "guided_choice": constrains(["a.b", "c"], "regex", r"a\.b|c"),
        "guided_grammar": constrains('start: "a"', "lark", 'start: "a"'),
        "user": changes_nothing("someone"),
        "cache_salt": Case("mine", lambda seen: seen.sent[0].salt, "", "mine"),
        "priority": Case(5, lambda seen: seen.sent[0].priority, 0, 5),
        "timeout": Case(30, lambda seen: seen.sent[0].deadline and math.ceil(seen.sent[0].deadline), None, 30),
    }


CASES: dict[type, dict[str, Case]] = {
    CompletionBody: shared("no</think>" + TEXT) | {
        "prompt": Case("Twice", lambda seen: seen.prompt.endswith("Twice"), False, True, plain="Once"),
        "add_special_tokens": Case(False, lambda seen: seen.sent[0].prompt[0] == 0, True, False),
        "logprobs": Case(2, lambda seen: len((seen.choice["logprobs"] or {"tokens": ()})["tokens"]), 0, len(SAID)),
        "echo": Case(True, lambda seen: seen.text.startswith("Once"), False, True),
        "suffix": refused("the end"),
        "best_of": refused(2),
    },
    ChatBody: shared(TEXT) | {
        "messages": Case(
            [{"role": "user", "content": "Hi"}], lambda seen: "<｜User｜>Hi" in seen.prompt, False, True, plain=QUESTION
        ),
        "add_special_tokens": Case(True, lambda seen: list(seen.sent[0].prompt[:2]), [0, 3], [0, 0]),
        "max_completion_tokens": sent("max_tokens", 4, without=9, beside={"max_tokens": 9}),
        "logprobs": Case(True, lambda seen: seen.choice["logprobs"] is not None, False, True),
        "top_logprobs": Case(
            2, lambda seen: len(seen.choice["logprobs"]["content"][0]["top_logprobs"]), 0, 2, {"logprobs": True}
        ),
        "chat_template_kwargs": Case(
            {"mood": "gay"}, lambda seen: seen.prompt.endswith("[mood gay]"), False, True,
        ),
        "add_generation_prompt": Case(False, lambda seen: "<think>" in seen.prompt, True, False),
        "continue_final_message": Case(
            True, lambda seen: seen.prompt.endswith("It is"), False, True,
            {"messages": [*QUESTION, {"role": "assistant", "content": "It is"}]},
        ),
        "reasoning_effort": Case("low", lambda seen: seen.prompt.endswith("[effort low]"), False, True),
        "tools": Case([TOOL], lambda seen: "Adds." in seen.prompt, False, True),
        "tool_choice": Case(
            "required", lambda seen: seen.sampling.grammar is not None, False, True, {"tools": [TOOL]}
        ),
        "functions": refused([{"name": "add"}]),
        "function_call": refused({"name": "add"}),
        "parallel_tool_calls": Case(
            False, lambda seen: seen.sampling.grammar is not None, False, True, {"tools": [TOOL]}
        ),
        "service_tier": changes_nothing("flex"),
        "store": changes_nothing(True),
        "metadata": changes_nothing({"a": "b"}),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/tiny with recommendations of its own, and a template that shows its variables."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree("models/tiny", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    recommended = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1, "max_new_tokens": 50,
        "eos_token_id": EOS,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(recommended))
    with (folder / "chat_template.jinja").open("a") as template:
        template.write("{%- if mood %}[mood {{ mood }}]{% endif %}")
        template.write("{%- if reasoning_effort %}[effort {{ reasoning_effort }}]{% endif %}")
    return folder


@pytest.fixture
async def front(model: Path) -> AsyncIterator[Front]:
    async for one in make_front(Settings(port=0, model=str(model), drain_seconds=0.1), ScoringWorker):
        one.worker.script = lambda _: SAID
        one.worker.end = {"finish": "stop", "stop_token": EOS}
        yield one


async def ask(front: Front, path: str, body: dict[str, Any]) -> Seen:
    before = len(front.worker.admitted)
    answer = await front.http.post(path, json=body)
    seen = Seen(answer.status_code, front.worker.admitted[before:])
    if answer.headers["content-type"].startswith("text/event-stream"):
        events = answer.text.removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]
        return replace(seen, events=[json.loads(event.removeprefix("data: ")) for event in events])
    return replace(seen, answer=answer.json())


EVERY = [(kind, name) for kind in PATHS for name in kind.__struct_fields__]


@pytest.mark.parametrize(("kind", "name"), EVERY, ids=[f"{kind.__name__}-{name}" for kind, name in EVERY])
async def test_a_parameter_is_heeded(front: Front, kind: type, name: str) -> None:
    case = CASES[kind][name]
    plain = PLAIN[kind] | case.beside
    other = plain if case.plain is None else plain | {name: case.plain}
    without = await ask(front, PATHS[kind], other)
    having = await ask(front, PATHS[kind], plain | {name: case.value})
    expected = case.having
    if expected is SAME:
        assert case.view(without) == case.view(having)
        return
    if expected is REFUSED:
        expected = (400, name)
    elif callable(expected):
        expected = expected(TOKENIZER.encode_chat("</think>")[0] if kind is ChatBody else None)
    assert case.view(without) == case.without
    assert case.view(having) == expected


@pytest.mark.parametrize("kind", PATHS)
def test_the_table_names_no_parameter_that_is_not_there(kind: type) -> None:
    assert set(CASES[kind]) == set(kind.__struct_fields__)


@pytest.mark.parametrize(("given", "temperature", "penalty"), [(1e-40, 0.0, 1e-6), (1e-6, 1e-6, 1e-6), (0.5, 0.5, 0.5)])
async def test_logits_are_not_divided_until_they_overflow(
    front: Front, given: float, temperature: float, penalty: float
) -> None:
    body = {"model": "tiny", "prompt": "Once", "temperature": given, "repetition_penalty": given}
    seen = await ask(front, "/v1/completions", body)
    assert (seen.sampling.temperature, seen.sampling.repetition_penalty) == (temperature, penalty)


async def test_an_explicit_null_is_as_if_left_out(front: Front) -> None:
    for kind, path in PATHS.items():
        nulls = dict.fromkeys(kind.__struct_fields__) | PLAIN[kind]
        without, having = await ask(front, path, PLAIN[kind]), await ask(front, path, nulls)
        assert having.status == 200, having.answer
        assert without.sampling == having.sampling


async def test_scores_of_the_stand_in(front: Front) -> None:
    """What the other tests compare with."""
    seen = await ask(front, PATHS[CompletionBody], PLAIN[CompletionBody] | {"logprobs": 2})
    assert seen.choice["logprobs"]["token_logprobs"] == [own_logprob(token) for token in SAID]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", Defaults()),
        ('{"do_sample": true, "top_k": null}', Defaults()),
        (
            '{"temperature": 0, "top_p": 0.5, "top_k": -1, "min_p": 0.5, "repetition_penalty": 2, "max_new_tokens": 9}',
            Defaults(0.0, 0.5, -1, 0.5, 2.0, 9),
        ),
    ],
)
def test_what_the_checkpoint_recommends(tmp_path: Path, text: str, expected: Defaults) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    assert generation_defaults(tmp_path) == expected


@pytest.mark.parametrize("text", ["{", "[]", '{"temperature": -1}', '{"top_p": "high"}', '{"max_new_tokens": 0}'])
def test_a_malformed_recommendation_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json is malformed"):
        generation_defaults(tmp_path)


def test_without_a_recommendation(tmp_path: Path) -> None:
    assert generation_defaults(tmp_path) == Defaults()
