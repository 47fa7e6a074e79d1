"""Tokens, text in pieces: whatever the cut, the pieces joined are the whole; nothing is shown too early."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer

from common.messages import Sampling, TokenChunk, TokenLogprobs
from services.gateway.detokenizer import Detokenizer, text_and_offsets
from services.gateway.output import Delta, Output
from services.gateway.prepare import Echo, Job
from services.gateway.reasoning import CLOSE, OPEN, ReasoningSplitter
from services.gateway.stops import StopStrings
from services.gateway.tokenizer import Tokenizer

reference = HfTokenizer.from_file("models/tiny/tokenizer.json")
tokenizer = Tokenizer("models/tiny")


def detokenized(tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.pieces)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@given(st.text(max_size=60))
def test_text_comes_back_through_tokens(text: str) -> None:
    assert "".join(detokenized(reference.encode(text, add_special_tokens=False).ids)) == text


@given(st.lists(st.integers(0, 2047), max_size=60))
def test_any_tokens_give_what_decoding_them_at_once_gives(tokens: list[int]) -> None:
    assert "".join(detokenized(tokens)) == reference.decode(tokens, skip_special_tokens=True)


@given(st.text(max_size=40))
def test_never_half_a_character(text: str) -> None:
    pieces = detokenized(reference.encode(text, add_special_tokens=False).ids)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_a_character_of_four_tokens_comes_with_its_last_one() -> None:
    tokens = reference.encode("🦀", add_special_tokens=False).ids
    assert len(tokens) == 4
    assert detokenized(tokens) == ["", "", "", "🦀", ""]


def test_half_a_character_at_the_end_is_shown_as_the_replacement_character() -> None:
    tokens = reference.encode("🦀", add_special_tokens=False).ids[:2]
    assert detokenized(tokens) == ["", "", "\ufffd"]


def test_special_tokens_and_ids_beyond_the_tokenizer_have_no_text() -> None:
    assert detokenized([0, 1, 3, 5000]) == ["", "", "", "", ""]


# ---- stop strings


def stopped_at(text: str, stops: list[str]) -> str | None:
    """The definition: the stop string that is complete first ends the text where it begins."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return None


def through_stops(pieces: list[str], stops: list[str]) -> tuple[list[str], str | None]:
    checker, shown = StopStrings(stops), []
    for piece in pieces:
        text, met = checker.push(piece)
        shown.append(text)
        if met is not None:
            return shown, met
    return [*shown, checker.flush()], None


few = st.text(alphabet="ab\n", max_size=12)


@given(st.lists(few, max_size=8), st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=3))
def test_stop_strings_cut_the_same_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    text, expected = "".join(pieces), stopped_at("".join(pieces), stops)
    shown, met = through_stops(pieces, stops)
    assert (met is not None) == (expected is not None)
    assert "".join(shown) == (text if expected is None else expected)


@given(few, st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_only_what_may_begin_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    shown, met = StopStrings(stops).push(text)
    held = text[len(shown) :]
    assert met or held == "" or any(stop.startswith(held) for stop in stops)


# ---- reasoning


def split(pieces: list[str], inside: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(inside)
    parts = [*(splitter.push(piece) for piece in pieces), splitter.flush()]
    return "".join(reasoning for reasoning, _ in parts), "".join(answer for _, answer in parts)


tagged = st.lists(
    st.sampled_from(["<", "/", "think", ">", "a", "\n", "</think>", "<think>", "</th", "ink>"]), max_size=10
)


@given(tagged, st.booleans())
def test_reasoning_is_split_the_same_however_the_text_is_cut(pieces: list[str], inside: bool) -> None:
    assert split(pieces, inside) == split(["".join(pieces)], inside)


@given(tagged)
def test_the_first_closing_tag_ends_the_reasoning(pieces: list[str]) -> None:
    reasoning, _, answer = "".join(pieces).partition(CLOSE)
    assert split(pieces, inside=True) == (reasoning.lstrip("\n"), answer.lstrip("\n"))


@pytest.mark.parametrize(
    ("pieces", "inside", "expected"),
    [
        (["4 + 5 = ", "9", "</thi", "nk>", "\n\n", "It is 9"], True, ("4 + 5 = 9", "It is 9")),
        (["It is 9"], False, ("", "It is 9")),
        (["<th", "ink>\nhm", "</think>", "9"], False, ("hm", "9")),
        (["<thin", "g>"], False, ("", "<thing>")),
        (["\n\n9"], False, ("", "\n\n9")),
        (["all thought </t"], True, ("all thought </t", "")),
    ],
    ids=["R1", "plain", "own tag", "no tag", "newlines kept", "cut short"],
)
def test_reasoning(pieces: list[str], inside: bool, expected: tuple[str, str]) -> None:
    assert split(pieces, inside) == expected


# ---- the whole way: tokens in chunks to what a client sees, against one look at all of the text

PIECES = [
    *(b"a", b"b", b"ab", b"ba\n", b"\n\n", b""),
    *(b"\xf0", b"\x9f\xa6", b"\x80", b"\xf0\x9f", b"\xa6\x80a", b"\xc3", b"\xa9", "é🦀".encode()),
    *(b"<", b"/think", b">", b"</think>", b"</th", b"ink>b", b"<think>"),
]
SCORE = TokenLogprobs(-1.0, (), ())
some_tokens = st.lists(st.integers(0, len(PIECES)), max_size=24)  # the last id is beyond the tokenizer's
some_stops = st.lists(st.text(alphabet="ab\né🦀\ufffd</think>", min_size=1, max_size=6), max_size=3)


Reads = list[list[tuple[int, ...]]]  # tokens as they may come: some reads of some chunks of some tokens each
some_reads = st.lists(st.lists(st.lists(st.integers(0, len(PIECES)), max_size=4).map(tuple), max_size=3), max_size=5)


def complete_text(tokens: list[int]) -> str:
    """The characters that are complete after these tokens."""
    data = b"".join(PIECES[token] for token in tokens if token < len(PIECES))
    return codecs.utf_8_decode(data, "replace", False)[0]


def whole_text(tokens: list[int]) -> str:
    return b"".join(PIECES[token] for token in tokens if token < len(PIECES)).decode(errors="replace")


def cut_at_stop(tokens: list[int], stops: list[str], min_tokens: int, include: bool) -> tuple[str, str | None]:
    """The definition: (the text a client sees, the stop string). Of all places after the first `min_tokens` tokens
    where a stop string ends, the first one counts; of the strings that end there, the longest."""
    text = whole_text(tokens)
    first = len(complete_text(tokens[:min_tokens])) if len(tokens) > min_tokens else len(text)
    for end in range(first + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def run(reads: Reads, job: Job, *, split: bool = False, stop_token: int | None = None) -> Delta:
    """All deltas joined, up to a stop string or the end of the tokens."""
    output, total, index = Output(job, PIECES, split_reasoning=split), Delta(), 0
    reads = [*reads, [() if stop_token is None else (stop_token,)]]
    for n, read in enumerate(reads):
        chunks = []
        for m, tokens in enumerate(read):
            last = (n, m) == (len(reads) - 1, 0)
            ending = {"finish": "length" if stop_token is None else "stop", "stop_token": stop_token} if last else {}
            chunks.append(TokenChunk("r", index, tokens, logprobs=(SCORE,) * len(tokens), **ending))
            index += len(tokens)
        total.add(output.push(chunks))
        if total.finish:
            break
    return total


def job(stops: Sequence[str] = (), min_tokens: int = 0, **others) -> Job:
    return Job(0, (1,), (), Sampling(max_tokens=99, min_tokens=min_tokens), tuple(stops), **others)


def flat(reads: Reads) -> list[int]:
    return [token for read in reads for tokens in read for token in tokens]


@settings(max_examples=500, deadline=None)
@given(some_reads, some_stops, st.integers(0, 8), st.booleans())
@example([[(0, 6)]], ["a\ufffd"], 0, False)  # half a character at the end completes a stop string
@example([[(0, 6)]], ["ab"], 0, False)  # and follows what was held back for one
def test_any_chunks_of_tokens_are_cut_as_the_whole_text_is(
    reads: Reads, stops: list[str], min_tokens: int, include: bool
) -> None:
    seen = run(reads, job(stops, min_tokens, include_stop=include))
    expected, stop = cut_at_stop(flat(reads), stops, min_tokens, include)
    assert (seen.text, seen.stop_reason) == (expected, stop)
    assert seen.finish == ("length" if stop is None else "stop")


@settings(max_examples=500, deadline=None)
@given(some_reads, some_stops, st.integers(0, 8), st.booleans())
def test_reasoning_is_split_as_in_the_whole_text_cut_at_the_stop_string(
    reads: Reads, stops: list[str], min_tokens: int, inside: bool
) -> None:
    seen = run(reads, job(stops, min_tokens, reasoning=inside), split=True)
    text, _ = cut_at_stop(flat(reads), stops, min_tokens, include=False)
    assert (seen.reasoning, seen.text) == split_at_once(text, inside)


def split_at_once(text: str, inside: bool) -> tuple[str, str]:
    """The definition: reasoning ends at the first closing tag; not begun by the prompt, it begins with its own tag."""
    if not inside:
        head = text.lstrip()
        if not head.startswith(OPEN):
            return "", text
        text = head[len(OPEN) :]
    reasoning, _, answer = text.partition(CLOSE)
    return reasoning.lstrip("\n"), answer.lstrip("\n")


@given(some_reads)
def test_a_token_begins_where_the_text_before_it_ends(reads: Reads) -> None:
    echo = Echo("prompt", (0,))
    seen, tokens = run(reads, job(echo=echo)), flat(reads)
    assert seen.text == echo.text + whole_text(tokens)
    assert [s.offset for s in seen.scored] == [6 + len(complete_text(tokens[:i])) for i in range(len(tokens))]


@given(some_tokens)
def test_a_text_and_its_offsets_at_once(tokens: list[int]) -> None:
    text, offsets = text_and_offsets(tokens, PIECES)
    assert text == whole_text(tokens)
    assert offsets == [len(complete_text(tokens[:i])) for i in range(len(tokens))]


@pytest.mark.parametrize("include", [True, False])
@given(some_reads, st.integers(0, len(PIECES) - 1))
def test_the_token_that_ends_the_output_is_shown_only_if_asked_for(
    include: bool, reads: Reads, stop_token: int
) -> None:
    seen, tokens = run(reads, job(include_stop=include, token_ids=True), stop_token=stop_token), flat(reads)
    assert seen.text == whole_text([*tokens, stop_token] if include else tokens)
    assert seen.tokens == [*tokens, stop_token]
    assert [s.ending for s in seen.scored] == [False] * len(tokens) + [True]
