"""Tokens, text in pieces: whatever the cut, the pieces joined are the whole; nothing is shown too early."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer

from services.gateway.detokenizer import Detokenizer
from services.gateway.reasoning import CLOSE, ReasoningSplitter
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


def through_stops(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    checker, shown = StopStrings(stops), []
    for piece in pieces:
        text, met = checker.push(piece)
        shown.append(text)
        if met:
            return shown, True
    return [*shown, checker.flush()], False


few = st.text(alphabet="ab\n", max_size=12)


@given(st.lists(few, max_size=8), st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=3))
def test_stop_strings_cut_the_same_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    text, expected = "".join(pieces), stopped_at("".join(pieces), stops)
    shown, met = through_stops(pieces, stops)
    assert met == (expected is not None)
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
