"""The first launch: every logit is read once, and each block of a row leaves a few numbers."""
# mypy: allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from kernels.sample.nucleus import is_nucleus
from kernels.sample.row import adjusted, first_best, limits, mass, noise_key, noisiest_of_block
from kernels.tl_ops import let_next_begin, wait_ahead


@triton.jit
def scan(
    inputs, rules, wanted, scratch,
    BANS: tl.constexpr, APPROX: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (block, row). Greedy and unfiltered rows: the block's winner. Filtered ones: its mass, and the maximum of
    each GROUP, which bound the filters' thresholds; where top_p is the only filter the winner too. Rows that want
    logprobs: the same of the model's own logits."""
    best, best_id, blocks_mass, maxima, raw_best, raw_mass, raw_maxima, _found, scores, values, _above = scratch
    block, s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    vocab = inputs[2]
    wait_ahead(PDL)
    let_next_begin(PDL)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    here = s * tl.num_programs(0) + block
    groups = block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    kept = groups < tl.cdiv(vocab, GROUP)
    row_groups = s * tl.cdiv(vocab, GROUP) + groups
    x = adjusted(inputs, s, ids, ids < vocab, block * BLOCK, block * BLOCK + BLOCK - 1, BANS)
    if wanted is not None and tl.load(wanted + s) >= 0:
        raw = adjusted((inputs[0], inputs[1], vocab, None, None, None), s, ids, ids < vocab, 0, 0, BANS)
        top = tl.max(raw)
        tl.store(raw_best + here, top)
        tl.store(raw_mass + here, tl.sum(mass(raw, top, 1.0)))
        tl.store(raw_maxima + row_groups, tl.max(tl.reshape(raw, [BLOCK // GROUP, GROUP]), 1), mask=kept)
    temperature, filtered = 0.0, False
    if rules is not None:
        temperature, _k, _p, _m, filtered = limits(rules, s)
    if filtered:
        each = tl.max(tl.reshape(x, [BLOCK // GROUP, GROUP]), 1)
        tl.store(maxima + row_groups, each, mask=kept)
        top = tl.max(each)
        tl.store(best + here, top)
        tl.store(blocks_mass + here, tl.sum(mass(x, top, 1 / temperature)))
    nucleus = False
    if rules is not None:
        nucleus = is_nucleus(rules, s)
        if (temperature > 0) & (nucleus | (not filtered)):
            key = noise_key(tl.load(rules[4] + s), tl.load(rules[5] + s))
            score, token = noisiest_of_block(inputs, s, x, block * BLOCK, key, temperature, BANS, APPROX, LANES)
            tl.store(best_id + here, token)
            if nucleus:
                token = tl.minimum(token, vocab - 1)
                tl.store(scores + here, score)
                tl.store(values + here, adjusted(inputs, s, token, token >= 0, token, token, BANS))
            else:
                tl.store(best + here, score)
    if temperature <= 0:
        score, token = first_best(x, ids)
        tl.store(best + here, score)
        tl.store(best_id + here, token)
