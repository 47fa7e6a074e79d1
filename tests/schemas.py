"""JSON schemas drawn at random, of the keywords that people use."""

from __future__ import annotations

from random import Random
from typing import Any

WORDS = ("name", "age", "city", "tags", "score", "active", "note", "kind", "größe", "x-ray", "size", "owner")
PATTERNS = ("^[a-z]{2,8}$", "^[0-9]{3}-[0-9]{4}$", "^(yes|no|maybe)$", "^[A-Z][a-z]+( [A-Z][a-z]+)?$")

Schema = dict[str, Any]


def random_schema(rng: Random) -> Schema:
    """An object; what it holds is at most three levels deep."""
    return _object(rng, 2)


def _any(rng: Random, depth: int) -> Schema:
    leaves = [_string, _integer, _number, _enum, lambda _: {"type": "boolean"}, lambda _: {"type": "null"}, _nullable]
    if depth and rng.random() < 0.4:
        return rng.choice([_object, _array, _either])(rng, depth - 1)
    return rng.choice(leaves)(rng)


def _object(rng: Random, depth: int) -> Schema:
    names = rng.sample(WORDS, rng.randint(1, 5))
    return {
        "type": "object",
        "properties": {name: _any(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _array(rng: Random, depth: int) -> Schema:
    low = rng.randint(0, 2)
    return {"type": "array", "items": _any(rng, depth), "minItems": low, "maxItems": low + rng.randint(0, 3)}


def _either(rng: Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth), _any(rng, depth)]}


def _string(rng: Random) -> Schema:
    if rng.random() < 0.3:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    low = rng.randint(0, 3)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 20)}


def _integer(rng: Random) -> Schema:
    low = rng.randint(-1000, 1000)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)}


def _number(rng: Random) -> Schema:
    low = rng.randint(-10, 10) / 4
    return {"type": "number", "minimum": low, "exclusiveMaximum": low + rng.randint(1, 20)}


def _enum(rng: Random) -> Schema:
    values: list[Any] = ["red", "green", "blue", 1, 2.5, True, None, "a b", "é", ""]
    return {"enum": rng.sample(values, rng.randint(1, 4))}


def _nullable(rng: Random) -> Schema:
    return {"type": ["string", "null"], "maxLength": 12}
