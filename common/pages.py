"""How the KV cache is cut: pages of 64 tokens, full pages known by a hash chained over their tokens."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

PAGE = 64  # tokens


def page_hashes(tokens: Sequence[int], model: str, salt: str = "") -> list[bytes]:
    """16 bytes for each full page of `tokens`: equal for equal (model, salt, tokens up to the page's end)."""
    return extend_hashes([], tokens, model, salt)


def extend_hashes(hashes: list[bytes], tokens: Sequence[int], model: str, salt: str = "") -> list[bytes]:
    """`hashes` of the first pages of `tokens`, extended in place to all of its full pages."""
    previous = hashes[-1] if hashes else f"{model}\0{salt}".encode()
    for start in range(len(hashes) * PAGE, len(tokens) - len(tokens) % PAGE, PAGE):
        page = array("I", tokens[start : start + PAGE]).tobytes()
        previous = hashlib.blake2b(previous + page, digest_size=16).digest()
        hashes.append(previous)
    return hashes
