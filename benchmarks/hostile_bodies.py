"""Bodies of requests, well-formed ones and what hostile clients make of them."""

from __future__ import annotations

import json
from random import Random
from typing import Any

VALID: tuple[dict[str, Any], ...] = (
    {"model": "tiny", "prompt": "What is 2 + 2?", "max_tokens": 2, "temperature": 0},
    {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "stop": ["a", "b"]},
    {"model": "tiny", "input": "Hello", "max_output_tokens": 2},
    {"model": "tiny", "prompt": [20, 21, 22], "max_tokens": 1, "logprobs": 2, "echo": True},
)
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1e308, -1e308, 2**63, 2**200, "", "\x00", "\ud7ff", "x" * 5000, [], {}, [[]], {"a": {}}, [None],
    float("inf"), [1] * 3000, {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}},
)  # fmt: skip


def body(draw: Random, valid: tuple[dict[str, Any], ...] = VALID) -> bytes:
    value = json.loads(json.dumps(draw.choice(valid)))
    kind = draw.randrange(9)
    if kind == 0:
        return draw.randbytes(draw.randrange(400))
    if kind == 1:
        depth = draw.choice((100, 1000, 100_000))
        return b"[" * depth + b"]" * draw.choice((0, depth))
    if kind == 2:
        return b'{"prompt":"' + draw.randbytes(30).replace(b'"', b"") + b'","model":"tiny"}'
    if kind == 3:
        return b'{"model":"tiny",' + b'"a":1,' * draw.choice((10, 10_000)) + b'"prompt":"x","max_tokens":1}'
    for _ in range(draw.randrange(1, 4)):
        where = draw.choice([*value, "n", "seed", "logit_bias", "response_format", "tools", "stream_options", "zzz"])
        value[where] = draw.choice(ODD)
    data = json.dumps(value).encode()
    if kind == 4:
        data = data[: draw.randrange(len(data))]
    elif kind == 5:
        at = draw.randrange(len(data))
        data = data[:at] + draw.randbytes(2) + data[at + 1 :]
    return data
