"""What the output must be: the fields that say so, and what they may not be."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidRequest
from common.messages import MOST_GRAMMAR_BYTES, Grammar
from common.settings import Settings
from services.gateway import structured
from services.gateway.structured import one_of
from tests.api_front import TOKENIZER, Front, make_front

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CLOSE = TOKENIZER.encode_chat("</think>")[0]
SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"const": "é"}}}
AS_TEXT = '{"type":"object","properties":{"z":{"type":"integer"},"a":{"const":"é"}}}'
ANY_OBJECT = '{"type":"object"}'


def schema_format(schema: dict | None) -> dict:
    inner = {"name": "answer", "strict": True} | ({} if schema is None else {"schema": schema})
    return {"type": "json_schema", "json_schema": inner}


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    async for one in make_front(Settings(port=0, drain_seconds=0.1)):
        yield one


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", ANY_OBJECT),
        ({"response_format": schema_format(SCHEMA)}, "json_schema", AS_TEXT),
        ({"guided_json": SCHEMA}, "json_schema", AS_TEXT),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", json.dumps(SCHEMA)),
        ({"guided_regex": r"\d+"}, "regex", r"\d+"),
        ({"guided_choice": ["yes", "no."]}, "regex", r"yes|no\."),
        ({"guided_grammar": 'start: "x"'}, "lark", 'start: "x"'),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", AS_TEXT),
        ({"structured_outputs": {"json_object": True}}, "json_schema", ANY_OBJECT),
        ({"structured_outputs": {"regex": "a"}}, "regex", "a"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "regex", "a|b"),
        ({"structured_outputs": {"grammar": 'start: "x"'}}, "lark", 'start: "x"'),
        ({"guided_regex": "a", "response_format": {"type": "text"}}, "regex", "a"),
    ],
)
async def test_what_the_worker_is_told(front: Front, fields: dict, kind: str, text: str) -> None:
    """The properties keep their order: it is the order of the output."""
    assert (await front.post(CHAT, **fields)).status_code == 200
    assert front.sent.sampling.grammar == Grammar(kind, text, CLOSE)
    assert (await front.post(TEXT, prompt="x", **fields)).status_code == 200
    assert front.sent.sampling.grammar == Grammar(kind, text, None)


@pytest.mark.parametrize("fields", [{"response_format": {"type": "text"}}, {"structured_outputs": {}}, {}])
async def test_free_output(front: Front, fields: dict) -> None:
    assert (await front.post(CHAT, **fields)).status_code == 200
    assert front.sent.sampling.grammar is None


@pytest.mark.parametrize(
    ("path", "fields", "after"),
    [
        (CHAT, {}, CLOSE),
        (CHAT, {"add_generation_prompt": False}, None),
        (TEXT, {"prompt": "Why? <think>\n"}, CLOSE),
        (TEXT, {"prompt": TOKENIZER.encode("Why? <think>\n")}, CLOSE),
        (TEXT, {"prompt": "<think>hm</think>"}, None),
    ],
)
async def test_a_model_that_has_begun_to_reason_may_end_that_first(
    front: Front, path: str, fields: dict, after: int | None
) -> None:
    assert (await front.post(path, response_format={"type": "json_object"}, **fields)).status_code == 200
    assert front.sent.sampling.grammar is not None
    assert front.sent.sampling.grammar.after == after


@pytest.mark.parametrize(
    ("fields", "says", "param"),
    [
        ({"response_format": {"type": "xml"}}, "'xml'", "response_format.type"),
        ({"response_format": {}}, "missing required field `type`", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "`json_schema`", "response_format.json_schema"),
        ({"response_format": schema_format(None)}, "schema is missing", "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "`name`", None),
        ({"guided_json": "{"}, "guided_json is no JSON schema", "guided_json"),
        ({"guided_json": "[1]"}, "Expected `object`, got `array`", "guided_json"),
        ({"structured_outputs": {"json": "[" * 9000}}, "no JSON schema", "structured_outputs.json"),
        ({"guided_choice": []}, "length >= 1", "guided_choice"),
        ({"guided_choice": ["a", ""]}, "length >= 1", "guided_choice[1]"),
        ({"structured_outputs": {"structural_tag": "x"}}, "unknown field", "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "send one of them", "structured_outputs.choice"),
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "response_format and guided",
            "guided_regex",
        ),
        ({"guided_regex": "a" * (MOST_GRAMMAR_BYTES + 1)}, f"limit is {MOST_GRAMMAR_BYTES}", "guided_regex"),
        ({"guided_json": {"const": "é" * (MOST_GRAMMAR_BYTES // 2)}}, f"limit is {MOST_GRAMMAR_BYTES}", "guided_json"),
    ],
)
async def test_what_is_refused(front: Front, fields: dict, says: str, param: str | None) -> None:
    error = await front.refused(400, CHAT, **fields)
    assert says in error["message"]
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"structured_outputs": {"grammar": "?"}}, "structured_outputs.grammar"),
        ({"response_format": schema_format({"type": "x"})}, "response_format"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_grammar_that_the_worker_refuses_is_blamed_on_its_field(
    front: Front, fields: dict, param: str, stream: bool
) -> None:
    front.worker.refusals = [InvalidRequest("it does not compile", "response_format")]
    error = await front.refused(400, CHAT, stream=stream, **fields)
    assert (error["message"], error["param"]) == ("it does not compile", param)


async def test_another_refusal_of_the_worker_keeps_its_name(front: Front) -> None:
    front.worker.refusals = [InvalidRequest("too long", "prompt")]
    assert (await front.refused(400, CHAT, guided_regex="a"))["param"] == "prompt"


BYTES = llguidance.LLTokenizer("byte")
few_texts = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4)
metacharacters = st.lists(st.text("a.+*?()|[]{}^$#&-~\\ \n", min_size=1, max_size=5), min_size=1, max_size=4)


@settings(deadline=None)  # other work on the machine is no failure
@given(few_texts | metacharacters, st.text(max_size=3))
def test_a_choice_admits_its_texts_and_no_other(texts: list[str], other: str) -> None:
    grammar = llguidance.LLMatcher.grammar_from_regex(one_of(texts))
    for text in [*texts, other]:
        matcher = llguidance.LLMatcher(BYTES, grammar, log_level=0)
        data = list(text.encode())
        admitted = matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()
        assert admitted == (text in texts)


async def test_a_million_choices_are_refused_before_anything_is_made_of_them(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structured, "one_of", lambda _: pytest.fail("it was made"))
    error = await front.refused(400, CHAT, guided_choice=["a"] * 500_000)
    assert "guided_choice is 999999 bytes: the limit is" in error["message"] and error["param"] == "guided_choice"
