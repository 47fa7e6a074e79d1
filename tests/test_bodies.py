"""What is told of a body's unknown fields: enough to find a typing error, and no more than any body may cost."""

from __future__ import annotations

import json

import pytest

from services.gateway.bodies import MOST_COLONS, MOST_NAMED, NAME_CHARACTERS, decode_body
from services.gateway.protocol import CompletionBody

BODY = {"model": "tiny", "prompt": "a: b"}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (["best"], ["best"]),
        (list("abc") * 2, list("abc")),
        ([f"f{i}" for i in range(100)], [f"f{i}" for i in range(MOST_NAMED)]),
        ([f"f{i}" for i in range(MOST_COLONS)], []),
        (["x" * 1000], ["x" * NAME_CHARACTERS]),
    ],
    ids=["one", "twice", "a hundred", "too many to look at", "a long name"],
)
def test_unknown_fields_are_named_within_limits(fields: list[str], told: list[str]) -> None:
    text = json.dumps(BODY)[:-1] + "".join(f', "{name}" : 1' for name in fields) + "}"
    body, unknown = decode_body(text.encode(), CompletionBody)
    assert (body.prompt, unknown) == ("a: b", told)
