"""The last launch: one program a row makes a token, and logprobs, of what the ones before left.

A filtered row needs few of its logits again: what the filters leave lies in groups whose maximum reaches a bound that
the maxima alone give, since at least as many tokens as maxima reach it. These groups, a chunk of CHUNK at a time, are
read again; when they are one chunk, as nearly always, it stays in registers.

The winner is found without sorting. The noisiest token of any superset of what the filters leave, if they leave it, is
the noisiest of what they leave. If they do not, their threshold lies above it: try again among the better ones.
"""
# mypy: allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from kernels.sample.nucleus import first_left, is_nucleus
from kernels.sample.row import (
    LN2,
    adjusted,
    first_best,
    limits,
    mass,
    noise_key,
    noisiest,
    ordered,
    unordered,
)
from kernels.tl_ops import let_next_begin, wait_ahead

NOTHING = tl.constexpr(-2139095041)  # ordered(-inf)


@triton.jit
def finish(
    inputs, rules, out, wanted, logs, scratch, blocks, parts,
    BANS: tl.constexpr, APPROX: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, PARTS: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    best, best_id, blocks_mass, maxima, raw_best, raw_mass, raw_maxima, found, _scores, _values, _above = scratch
    s, vocab = tl.program_id(0).to(tl.int64), inputs[2]
    wait_ahead(PDL)
    let_next_begin(PDL)
    groups = tl.cdiv(vocab, GROUP)
    found += s * groups
    at = tl.arange(0, BLOCKS)
    here = s * blocks + at
    scores = tl.load(best + here, mask=at < blocks, other=float("-inf"))
    token = first_best(scores, tl.load(best_id + here, mask=at < blocks, other=0x7FFFFFFF))[1]
    if rules is not None:
        temperature, top_k, top_p, min_p, filtered = limits(rules, s)
        if filtered:
            masses = tl.load(blocks_mass + here, mask=at < blocks, other=0.0)
            total = tl.sum(masses * mass(scores, tl.max(scores), 1 / temperature))
            key = noise_key(tl.load(rules[4] + s), tl.load(rules[5] + s))
            settled = False
            if is_nucleus(rules, s):
                token, settled = first_left(
                    inputs, s, scratch, blocks, parts, key, temperature, top_p * total,
                    BANS, APPROX, BLOCK, BLOCKS, PARTS,
                )  # fmt: skip
            if not settled:
                keys = _keys(maxima + s * groups, groups, GROUPS)
                rule = temperature, top_k, top_p, min_p, key, total
                token = _filtered(inputs, s, rule, keys, groups, found, BANS, APPROX, GROUP, CHUNK)
    token = tl.minimum(token, vocab - 1)
    tl.store(out + s, token.to(tl.int64))
    if inputs[3] is not None:
        _count(inputs[3], s, token, vocab)
    if wanted is not None:
        count = tl.load(wanted + s).to(tl.int32)
        if count >= 0:
            tops = tl.load(raw_best + here, mask=at < blocks, other=float("-inf"))
            top = tl.max(tops)
            masses = tl.load(raw_mass + here, mask=at < blocks, other=0.0)
            whole = top + tl.log2(tl.sum(masses * mass(tops, top, 1.0))) * LN2
            raw = inputs[0], inputs[1], vocab, None, None, None
            tl.store(logs[0] + s, tl.load(inputs[0] + s * inputs[1] + token).to(tl.float32) - whole)
            if count > 0:
                keys = _keys(raw_maxima + s * groups, groups, GROUPS)
                _list_best(raw, s, keys, groups, count, whole, logs, found, GROUP, CHUNK)


@triton.jit
def _keys(maxima, groups, GROUPS: tl.constexpr):
    at = tl.arange(0, GROUPS)
    return ordered(tl.load(maxima + at, mask=at < groups, other=float("-inf")))


@triton.jit
def _count(penalties, s, token, vocab):
    counts, slot = penalties[3], tl.load(penalties[4] + s)
    if slot >= 0:
        tl.store(counts + slot * vocab + token, tl.load(counts + slot * vocab + token) + 1)


@triton.jit
def _bound(keys, best, groups, least, most):
    """A key that `least` or more maxima reach, so that as many tokens do, and `most` or fewer if ties let it."""
    at = tl.arange(0, keys.shape[0])
    low, high, count = tl.min(tl.where(at < groups, keys, best)), best + 1, groups
    while (count > most) & (low + 1 < high):
        middle = (low & high) + ((low ^ high) >> 1)  # without overflow
        reach = tl.sum((keys >= middle).to(tl.int32))
        if reach >= least:
            low = middle
            count = reach
        else:
            high = middle
    return tl.where(groups < least, NOTHING + 1, tl.maximum(low, NOTHING + 1))


@triton.jit
def _find(keys, bound, found):
    """List the groups whose maximum reaches the bound in `found`, those beyond it first. Returns how many."""
    at = tl.arange(0, keys.shape[0])
    beyond, equal = (keys > bound).to(tl.int32), (keys == bound).to(tl.int32)
    many = tl.sum(beyond)
    tl.debug_barrier()  # what was listed before is no longer read
    tl.store(found + tl.cumsum(beyond) - 1, at, mask=beyond != 0)
    tl.store(found + many + tl.cumsum(equal) - 1, at, mask=equal != 0)
    tl.debug_barrier()
    return many + tl.sum(equal)


@triton.jit
def _chunk(inputs, s, found, first, listed, BANS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """([CHUNK, GROUP] logits, their ids) of the listed groups from `first` on."""
    at = first + tl.arange(0, CHUNK)
    groups = tl.load(found + at, mask=at < listed, other=0)
    ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (at < listed)[:, None] & (ids < inputs[2])
    x = adjusted(inputs, s, ids, inside, 0, inputs[2], BANS)
    return tl.where(x == x, x, float("-inf")), ids


@triton.jit
def _above(x, key, best, rate):
    """(how many of x are better than `key`, their mass)"""
    better = ordered(x) > key
    return tl.sum(better.to(tl.int32)), tl.sum(tl.where(better, mass(x, best, rate), 0.0))


@triton.jit
def _all_above(
    tile, inputs, s, found, listed, key, best, rate,
    BANS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    count, total = _above(tile, key, best, rate)
    first = CHUNK
    while first < listed:
        x, _ids = _chunk(inputs, s, found, first, listed, BANS, GROUP, CHUNK)
        more, part = _above(x, key, best, rate)
        count += more
        total += part
        first += CHUNK
    return count, total


@triton.jit
def _noisiest_above(x, ids, low, noise, temperature, APPROX: tl.constexpr):
    """(score, id, key) of the noisiest of x that are better than `low`."""
    keys = ordered(x)
    score, token = noisiest(tl.where(keys > low, x, float("-inf")), ids, noise, temperature, APPROX)
    key = tl.max(tl.where(ids == token, keys, NOTHING))
    return score, token, tl.where(score > float("-inf"), key, 0x7FFFFFFF)


@triton.jit
def _filtered(
    inputs, s, rule, maxima, groups, found,
    BANS: tl.constexpr, APPROX: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    temperature, top_k, top_p, min_p, noise, total = rule
    rate = 1 / temperature
    best_key = tl.max(maxima)
    best = unordered(best_key)
    floor = ordered(tl.minimum(best + temperature * LN2 * tl.log2(tl.maximum(min_p, 1e-30)), best))
    floor = tl.maximum(tl.where(min_p > 0, floor, NOTHING), NOTHING + 1)
    # For top_k the bound is certain; for top_p alone it is a guess; min_p is one itself.
    least = tl.where(top_k > 0, top_k, tl.where(top_p < 1, CHUNK // 2, groups + 1))
    bound = _bound(maxima, best_key, groups, least, tl.where(top_k > 0, top_k, CHUNK))
    bound = tl.where((top_k > 0) | (top_p < 1), bound, floor)
    listed = _find(maxima, bound, found)
    x, ids = _chunk(inputs, s, found, 0, listed, BANS, GROUP, CHUNK)
    if (top_p < 1) & (top_k <= 0) & (floor < bound):
        held = _all_above(x, inputs, s, found, listed, bound - 1, best, rate, BANS, GROUP, CHUNK)[1]
        if held <= top_p * total * 1.001:
            bound = floor
            listed = _find(maxima, bound, found)
            x, ids = _chunk(inputs, s, found, 0, listed, BANS, GROUP, CHUNK)
    if (top_p < 1) & (top_k > 0):
        low, high = bound, best_key + 1  # between them: the k-th best
        count, total = _all_above(x, inputs, s, found, listed, low - 1, best, rate, BANS, GROUP, CHUNK)
        while (count > top_k) & (low + 1 < high):
            middle = (low & high) + ((low ^ high) >> 1)
            reach, part = _all_above(x, inputs, s, found, listed, middle - 1, best, rate, BANS, GROUP, CHUNK)
            if reach >= top_k:
                low = middle
                count = reach
                total = part
            else:
                high = middle
    low = tl.maximum(bound, floor) - 1
    token, settled = 0, False
    while not settled:
        score, token, key = _noisiest_above(x, ids, low, noise, temperature, APPROX)
        first = CHUNK
        while first < listed:
            more, more_ids = _chunk(inputs, s, found, first, listed, BANS, GROUP, CHUNK)
            other, other_token, other_key = _noisiest_above(more, more_ids, low, noise, temperature, APPROX)
            if other > score:
                score = other
                token = other_token
                key = other_key
            first += CHUNK
        count, held = _all_above(x, inputs, s, found, listed, key, best, rate, BANS, GROUP, CHUNK)
        left = ((top_k <= 0) | (count < top_k)) & ((top_p >= 1) | (held < top_p * total))
        settled = (count == 0) | left
        low = key
    return token


@triton.jit
def _list_best(inputs, s, keys, groups, count, whole, logs, found, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """The `count` best logprobs: one after the other, the first of equal ones first."""
    _chosen, top_ids, top, columns = logs
    bound = _bound(keys, tl.max(keys), groups, count, CHUNK)
    listed = _find(keys, bound, found)
    x, ids = _chunk(inputs, s, found, 0, listed, 1, GROUP, CHUNK)
    i = 0
    while i < tl.minimum(count, columns):
        value, token = first_best(x, ids)
        tl.store(top_ids + s * columns + i, token.to(tl.int64))
        tl.store(top + s * columns + i, value - whole)
        x = tl.where(ids == token, float("-inf"), x)
        i += 1
