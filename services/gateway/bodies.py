"""Any request's body: JSON to the Struct that describes it, with errors that name the place."""

from __future__ import annotations

import functools
import itertools
from typing import Any, TypeVar

import msgspec

from common.errors import InvalidRequest
from services.gateway.protocol import param_of

MOST_NAMED = 20  # unknown fields of a body that are named
NAME_CHARACTERS = 100  # of each
MOST_COLONS = 20_000  # in a body in which unknown fields are looked for: there are no more fields than colons

T = TypeVar("T", bound=msgspec.Struct)
_raw = msgspec.json.Decoder(dict[str, msgspec.Raw])


def decode_body(data: bytes, kind: type[T]) -> tuple[T, list[str]]:
    """The body, and the names of fields that are unknown and ignored, as many as are told. Raises InvalidRequest."""
    try:
        body: T = _decoder(kind).decode(data)
        return body, _unknown(data, kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error), param_of(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


@functools.cache
def _decoder(kind: type[Any]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def _unknown(data: bytes, kind: type[Any]) -> list[str]:
    """None where there may be so many that a look at each would hold up every stream."""
    if data.count(b":") > MOST_COLONS:
        return []
    known = frozenset(kind.__struct_encode_fields__)
    names = (name[:NAME_CHARACTERS] for name in _raw.decode(data) if name not in known)
    return list(itertools.islice(names, MOST_NAMED))
