"""Token ids to text as they come: never half a UTF-8 character, a constant amount of work a token."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

_utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The texts it returns, joined, are what decoding all tokens at once gives (U+FFFD for bytes that are no UTF-8)."""

    __slots__ = ("_decoder", "_pieces")

    def __init__(self, pieces: Sequence[bytes]) -> None:
        """`pieces`: the bytes of each token id, empty for those that are not shown."""
        self._pieces = pieces
        self._decoder = _utf8(errors="replace")

    def push(self, token: int) -> str:
        # Checkpoints pad the vocabulary of the head: an id beyond the tokenizer's has no text.
        return self._decoder.decode(self._pieces[token]) if token < len(self._pieces) else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def text_and_offsets(tokens: Sequence[int], pieces: Sequence[bytes]) -> tuple[str, list[int]]:
    """The text of all tokens, and where in it each begins: how many characters are complete before it."""
    detokenizer, texts, offsets, at = Detokenizer(pieces), [], [], 0
    for token in tokens:
        offsets.append(at)
        texts.append(detokenizer.push(token))
        at += len(texts[-1])
    return "".join(texts) + detokenizer.flush(), offsets


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, as byte-level BPE vocabularies are written: character -> byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def piece(token: str, alphabet: dict[str, int]) -> bytes:
    """The bytes a vocabulary entry stands for; one that has a character outside the alphabet stands for itself."""
    try:
        return bytes(alphabet[character] for character in token)
    except KeyError:
        return token.encode()
