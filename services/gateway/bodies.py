"""Any request's body: JSON to the Struct that describes it, with errors that name the place."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import msgspec

from common.errors import InvalidRequest
from services.gateway.protocol import param_of

T = TypeVar("T", bound=msgspec.Struct)
_raw = msgspec.json.Decoder(dict[str, msgspec.Raw])


def decode_body(data: bytes, kind: type[T]) -> tuple[T, list[str]]:
    """The body, and the names of fields that are unknown and ignored. Raises InvalidRequest."""
    try:
        body: T = _decoder(kind).decode(data)
        return body, [name for name in _raw.decode(data) if name not in kind.__struct_encode_fields__]
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error), param_of(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


@functools.cache
def _decoder(kind: type[Any]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)
