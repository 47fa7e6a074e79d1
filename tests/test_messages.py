"""The wire: every message survives it, nothing else passes, and an error arrives as the error it was."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import errors, messages
from common.messages import (
    ExpertMap,
    ExpertRows,
    Failed,
    Generate,
    GetMap,
    Message,
    PagesChanged,
    Sampling,
    ShardEntry,
    StepTokens,
    TokenChunk,
    TokenLogprobs,
    WorkerBeat,
    decode,
    encode,
)

ALL = [cls for cls in vars(messages).values() if isinstance(cls, type) and issubclass(cls, Message)]
NESTED = (Message, Sampling)  # the base, and what travels only inside Generate

SAMPLES: list[Message] = [
    Generate(request_id="r", gateway_id="g", prompt=(1, 2, 3), sampling=Sampling(max_tokens=4, logprobs=0)),
    StepTokens(
        worker_id="w",
        boot_id="b",
        chunks=(
            TokenChunk("r", 7, (1, 2), logprobs=(TokenLogprobs(-0.5, (1, 9), (-0.5, -1.5)),)),
            TokenChunk("s", 0, (), finish="error", error=("worker_lost", "it is gone")),
        ),
    ),
    PagesChanged(worker_id="w", boot_id="b", seq=1, added=(b"\0\xff" * 8,), full=True),
    ExpertMap(version=3, model="m", partitions=2, owners=(("a",), ("a", "b")), shards={"a": ShardEntry("x", "n")}),
    ExpertRows(worker_id="w", boot_id="b", layer=1, rows=2, x=b"\0" * 8, ids=b"\1" * 8, weights=b"\2" * 8),
    WorkerBeat(id="w", boot_id="b", node="n", model="m", state="draining", map_version=9, reason="why"),
    Failed(code="overloaded", message="full", param="prompt"),
    GetMap(),
]


@pytest.mark.parametrize("message", SAMPLES, ids=lambda m: type(m).__name__)
def test_what_is_sent_is_what_arrives(message: Message):
    arrived = decode(encode(message))
    assert arrived == message and type(arrived) is type(message)


def test_every_message_can_be_decoded():
    """A new message that is missing in the decoder's union would be refused by whoever receives it."""
    known = {cls for cls in ALL if cls not in NESTED}
    for cls in known:
        required = {f.encode_name: None for f in msgspec.structs.fields(cls) if f.required}
        data = msgspec.msgpack.encode({"type": cls.__name__, **required})
        try:
            decode(data)
        except msgspec.ValidationError as error:
            assert "Invalid value" not in str(error), f"{cls.__name__} is not in the union"
    assert len(known) > 20


@given(st.binary(max_size=200))
def test_noise_is_refused_with_a_decode_error_alone(data: bytes):
    with contextlib.suppress(msgspec.DecodeError):
        assert isinstance(decode(data), Message)


@given(st.binary(max_size=64), st.integers(0, len(encode(SAMPLES[0]))))
def test_a_message_that_was_cut_or_garbled_is_refused_with_a_decode_error_alone(noise: bytes, cut: int):
    whole = encode(SAMPLES[0])
    with contextlib.suppress(msgspec.DecodeError):
        assert isinstance(decode(whole[:cut] + noise), Message)


def test_a_wrong_type_is_named_with_its_path():
    data = msgspec.msgpack.encode({"type": "GetMap"} | {"type": "Resume", "request_id": 3, "index": 0})
    with pytest.raises(msgspec.ValidationError, match=r"Expected `str`, got `int` - at `\$\.request_id`"):
        decode(data)


def test_messages_are_frozen():
    with pytest.raises(AttributeError):
        SAMPLES[0].request_id = "other"  # type: ignore[attr-defined]


@pytest.mark.parametrize("code", sorted(errors.BY_CODE))
def test_every_error_travels_as_itself(code: str):
    error = errors.from_code(code, "why", "prompt")
    arrived = Failed.of(error).error()
    assert type(arrived) is type(error) and (arrived.message, arrived.param) == ("why", "prompt")
    assert arrived.code == code and 400 <= arrived.status < 600


def test_an_unknown_error_is_an_internal_one():
    assert type(errors.from_code("of a later version", "why")) is errors.InternalError


def test_every_503_tells_when_to_retry():
    useful = {code for code, error in errors.BY_CODE.items() if error.retry_after}
    assert useful == {code for code, e in errors.BY_CODE.items() if e.status in (429, 503)} | {"body_timeout"}


def test_no_two_errors_share_a_code():
    def leaves(cls: type[errors.MoeculeError]) -> list[type[errors.MoeculeError]]:
        own = [sub for sub in cls.__subclasses__() if sub.__module__ == cls.__module__]
        return [cls, *(leaf for sub in own for leaf in leaves(sub))]

    codes = [cls.code for cls in leaves(errors.MoeculeError) if cls is not errors.MoeculeError]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize(
    "broken",
    [
        dict(gateway_id="a b"),
        dict(gateway_id="g\r\nPUB x"),
        dict(sampling=Sampling(max_tokens=1, logprobs=-1)),
        dict(sampling=Sampling(max_tokens=1, logprobs=10**6)),
        dict(sampling=Sampling(max_tokens=1, temperature=float("nan"))),
        dict(sampling=Sampling(max_tokens=1, top_p=0.0)),
        dict(sampling=Sampling(max_tokens=1, top_k=-1)),
    ],
    ids=str,
)
def test_a_request_out_of_bounds_is_not_read(broken: dict):
    good = dict(request_id="r", gateway_id="g", prompt=(1,), sampling=Sampling(max_tokens=1))
    decode(encode(Generate(**good)))
    with pytest.raises(msgspec.ValidationError):
        decode(encode(Generate(**good | broken)))
