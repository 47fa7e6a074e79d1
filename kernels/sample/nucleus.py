"""top_p alone, as most clients send it.

The noisiest token of all is one that top_p leaves, with the probability top_p. So the first launch finds each block's
noisiest token, and of these come a few candidates: the noisiest of all, and each next one the noisiest of those better
than the last. `weigh`, a launch of many programs, sums the mass of what is better than each; the launch after it takes
the first candidate that top_p leaves. If all fail, or one may not be what it seems, the filters' slower way remains.
"""
# mypy: allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from kernels.sample.row import adjusted, first_best, limits, mass, noisiest
from kernels.tl_ops import let_next_begin, wait_ahead

TRIES = tl.constexpr(4)
BEST, BEST_ID, SCORES, VALUES, ABOVE = (tl.constexpr(i) for i in (0, 1, 8, 9, 10))  # of SampleScratch's fields


@triton.jit
def weigh(
    inputs, rules, scratch, blocks,
    BANS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, part of PART blocks). above[s, part, i] = mass of its tokens better than the row's candidate i."""
    s, part, vocab = tl.program_id(0).to(tl.int64), tl.program_id(1), inputs[2]
    wait_ahead(PDL)
    let_next_begin(PDL)
    if is_nucleus(rules, s):
        first = part * (PART * BLOCK)
        ids, k = first + tl.arange(0, PART * BLOCK), tl.arange(0, TRIES)
        x = adjusted(inputs, s, ids, ids < vocab, first, first + PART * BLOCK - 1, BANS)
        at = tl.arange(0, BLOCKS)
        best = tl.max(tl.load(scratch[BEST] + s * blocks + at, mask=at < blocks, other=float("-inf")))
        values = candidates(scratch, s, blocks, BLOCKS)[2]
        each, sums = mass(x, best, 1 / tl.load(rules[0] + s)), tl.zeros([TRIES], tl.float32)
        for i in tl.static_range(TRIES):
            sums = tl.where(k == i, tl.sum(tl.where(x > entry(values, i), each, 0.0)), sums)
        tl.store(scratch[ABOVE] + (s * tl.num_programs(1) + part) * TRIES + k, sums)


@triton.jit
def is_nucleus(rules, s):
    temperature, top_k, top_p, min_p, _filtered = limits(rules, s)
    return (temperature > 0) & (top_p < 1) & (top_k <= 0) & (min_p <= 0)


@triton.jit
def entry(values, i):
    """The i-th of [TRIES]."""
    return tl.sum(tl.where(tl.arange(0, TRIES) == i, values, 0))


@triton.jit
def _winners(scratch, s, blocks, BLOCKS: tl.constexpr):
    """(score, token, logit) [BLOCKS] of each block's noisiest."""
    at = tl.arange(0, BLOCKS)
    here, real = s * blocks + at, at < blocks
    score = tl.load(scratch[SCORES] + here, mask=real, other=float("-inf"))
    token = tl.load(scratch[BEST_ID] + here, mask=real, other=0x7FFFFFFF)
    return score, token, tl.load(scratch[VALUES] + here, mask=real, other=float("-inf"))


@triton.jit
def candidates(scratch, s, blocks, BLOCKS: tl.constexpr):
    """(scores, tokens, logits) [TRIES]; the score of one that is missing is -inf."""
    scores, tokens, values = _winners(scratch, s, blocks, BLOCKS)
    k, low = tl.arange(0, TRIES), float("-inf")
    best, winners, logits = (
        tl.full([TRIES], low, tl.float32),
        tl.zeros([TRIES], tl.int32),
        tl.zeros([TRIES], tl.float32),
    )
    for i in tl.static_range(TRIES):
        score, token = first_best(tl.where(values > low, scores, float("-inf")), tokens)
        low = tl.max(tl.where((tokens == token) & (scores == score), values, low))
        best, winners = tl.where(k == i, score, best), tl.where(k == i, token, winners)
        logits = tl.where(k == i, low, logits)
    return best, winners, logits


@triton.jit
def first_left(
    inputs, s, scratch, blocks, parts, noise, temperature, limit,
    BANS: tl.constexpr, APPROX: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """(token, whether it is certain): the first candidate with less than `limit` of mass above it."""
    part, k = tl.arange(0, PARTS)[:, None], tl.arange(0, TRIES)[None, :]
    above = tl.sum(tl.load(scratch[ABOVE] + (s * parts + part) * TRIES + k, mask=part < parts, other=0.0), 0)
    scores, tokens, values = candidates(scratch, s, blocks, BLOCKS)
    i, token, settled, sure = 0, entry(tokens, 0), entry(above, 0) < limit, entry(scores, 0) > float("-inf")
    while sure & (not settled) & (i + 1 < TRIES):
        low, i = entry(values, i), i + 1
        token, score = entry(tokens, i), entry(scores, i)
        sure = (score > float("-inf")) & (
            not _hidden(inputs, s, scratch, blocks, low, score, noise, temperature, BANS, APPROX, BLOCK, BLOCKS)
        )
        settled = entry(above, i) < limit
    return token, settled & sure


@triton.jit
def _hidden(
    inputs, s, scratch, blocks, low, score, noise, temperature,
    BANS: tl.constexpr, APPROX: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Whether a block whose noisiest token is no better than `low` has one that is, with a greater score."""
    at, ids = tl.arange(0, BLOCKS), tl.arange(0, BLOCK)
    scores, _tokens, values = _winners(scratch, s, blocks, BLOCKS)
    scores, found = tl.where(values > low, float("-inf"), scores), False
    top, block = first_best(scores, at)
    while (top > score) & (not found):
        first = block * BLOCK
        x = adjusted(inputs, s, first + ids, first + ids < inputs[2], first, first + BLOCK - 1, BANS)
        found = noisiest(tl.where(x > low, x, float("-inf")), first + ids, noise, temperature, APPROX)[0] > score
        scores = tl.where(at == block, float("-inf"), scores)
        top, block = first_best(scores, at)
    return found
