"""What both launches know of a row: its adjusted logits, its noise, and an order of floats as integers."""
# mypy: allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)  # splitmix64, as in naive
MIX_0 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_1 = tl.constexpr(0x94D049BB133111EB)
PROMPT = tl.constexpr(1 << 30)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SLACK = tl.constexpr(1e-4)  # more than what rounding takes from a bound


@triton.jit
def adjusted(inputs, s, ids, inside, lowest, highest, BANS: tl.constexpr):
    """Logits of row s at `ids`, all in lowest .. highest, as float32 after penalties, mask and bans; -inf outside."""
    logits, stride, vocab, penalties, mask, bans = inputs
    x = tl.load(logits + s * stride + ids, mask=inside, other=float("-inf")).to(tl.float32)
    if penalties is not None:
        x = _penalised(x, penalties, s, ids, inside, vocab)
    if mask is not None:
        word = tl.load(mask + s * tl.cdiv(vocab, 32) + ids // 32, mask=inside, other=0)
        x = tl.where((word >> (ids % 32)) & 1 != 0, x, float("-inf"))
    if bans is not None:
        x = _banned(x, bans, s, ids, lowest, highest, BANS)
    return x


@triton.jit
def _penalised(x, penalties, s, ids, inside, vocab):
    presence, frequency, repetition, counts, slots = penalties
    slot = tl.load(slots + s)
    if slot >= 0:
        count = tl.load(counts + slot * vocab + ids, mask=inside, other=0)
        output = count & (PROMPT - 1)
        rate = tl.load(repetition + s)
        scaled = tl.where(x > 0, x / rate, x * rate)
        x = tl.where(count > 0, scaled, x) - tl.load(frequency + s) * output.to(tl.float32)
        x -= tl.where(output > 0, tl.load(presence + s), 0.0)
    return x


@triton.jit
def _banned(x, bans, s, ids, lowest, highest, BANS: tl.constexpr):
    rows, tokens, odd = bans  # odd: 2 * how many + 1, for a 1 and what 16 divides have kernels of their own
    at = tl.arange(0, BANS)
    token = tl.load(tokens + at, mask=at < odd // 2, other=-1).to(tl.int32)
    row = tl.load(rows + at, mask=at < odd // 2, other=-1)
    token = tl.where((row == s) & (token >= lowest) & (token <= highest), token, -1)
    worst = tl.max(token)
    while worst >= 0:  # none or one, nearly always
        x = tl.where(ids == worst, float("-inf"), x)
        token = tl.where(token == worst, -1, token)
        worst = tl.max(token)
    return x


@triton.jit
def mix(x):
    x = (x ^ (x >> 30)) * MIX_0
    x = (x ^ (x >> 27)) * MIX_1
    return x ^ (x >> 31)


@triton.jit
def noise_key(seed, position):
    return mix(mix(seed.to(tl.uint64, bitcast=True)) + position.to(tl.uint64, bitcast=True) * GOLDEN)


@triton.jit
def noisiest(x, ids, key, temperature, APPROX: tl.constexpr):
    """(score, id) of the best x / temperature + noise.

    Noise is -ln(-ln(1 - rest)) <= -ln(rest), and the high half of the hash nearly is rest. So half of the arithmetic
    bounds every score, closely where the noise is large, and the whole is done for the few that might be the best.
    """
    bound = x * (LOG2E / temperature) - _log2_high(key, ids, APPROX)
    best, winner, top = float("-inf"), 0x7FFFFFFF, tl.max(bound)
    while top * LN2 + (32 * LN2 + SLACK) > best:
        token = tl.min(tl.where(bound == top, ids, 0x7FFFFFFF))
        score = (top + _log2_high(key, token, APPROX)) * LN2 + _noise(key, token, APPROX)
        if (score > best) | ((score == best) & (token < winner)):
            best = score
            winner = token
        bound = tl.where(ids == token, float("-inf"), bound)
        top = tl.max(bound)
    return best, winner


@triton.jit
def noisiest_of_block(
    inputs, s, x, first, key, temperature, BANS: tl.constexpr, APPROX: tl.constexpr, LANES: tl.constexpr
):
    """noisiest() of the whole block x, whose ids begin with `first`, for fewer instructions a logit.

    Each of LANES threads finds the two greatest bounds of its logits, whose lowest bits give way to where they lie. The
    few that might be the best are among these, or else noisiest() has to look.
    """
    WIDTH: tl.constexpr = x.shape[0] // LANES  # logits of a lane, in fours
    at, lane = tl.arange(0, x.shape[0]), tl.arange(0, LANES)
    from_first = key + first.to(tl.uint64) * GOLDEN  # noise of (key, first + i) is that of (from_first, i)
    bound = x * (LOG2E / temperature) - _log2_high(from_first, at, APPROX)
    if inputs[4] is not None or not APPROX:
        # Else -inf becomes NaN below, which NVIDIA's maximum passes over; where many are masked that misses seconds.
        bound = tl.maximum(bound, -3e38)
    mark = at // (4 * LANES) * 4 + at % 4
    bound = ((bound.to(tl.int32, bitcast=True) & -WIDTH) | mark).to(tl.float32, bitcast=True)
    bound = tl.reshape(tl.permute(tl.reshape(bound, [WIDTH // 4, LANES, 4]), (1, 0, 2)), [LANES, WIDTH])
    top, second = _two_best(bound, tl.full([LANES, WIDTH], float("-inf"), tl.float32))
    best, winner, highest, lost = float("-inf"), 0x7FFFFFFF, tl.max(top), float("-inf")
    while _most(highest) > best:
        mine = lane == tl.min(tl.where(top == highest, lane, LANES))
        place = highest.to(tl.int32, bitcast=True) & (WIDTH - 1)
        token = first + place // 4 * (4 * LANES) + tl.min(tl.where(mine, lane, LANES)) * 4 + place % 4
        score = adjusted(inputs, s, token, token >= 0, token, token, BANS) / temperature + _noise(key, token, APPROX)
        if (score > best) | ((score == best) & (token < winner)):
            best = score
            winner = token
        lost = tl.maximum(lost, tl.max(tl.where(mine & (second == float("-inf")), top, float("-inf"))))
        top = tl.where(mine, second, top)
        second = tl.where(mine, float("-inf"), second)
        highest = tl.max(top)
    if _most(lost) > best:
        # All anew, from ids that the compiler cannot know to be the same: to keep bounds or x costs the registers.
        ids = first + at + tl.minimum(winner, 0)
        x = adjusted(inputs, s, ids, ids < inputs[2], first, first + x.shape[0] - 1, BANS)
        best, winner = noisiest(x, ids, key, temperature, APPROX)
    return best, winner


@triton.jit
def _two_best(top, second):
    """The two greatest of each row's."""
    if top.shape[1] > 1:
        half: tl.constexpr = [top.shape[0], top.shape[1] // 2, 2]
        a, b = tl.split(tl.reshape(top, half))
        c, d = tl.split(tl.reshape(second, half))
        return _two_best(tl.maximum(a, b), tl.maximum(tl.minimum(a, b), tl.maximum(c, d)))
    else:
        return tl.reshape(top, [top.shape[0]]), tl.reshape(second, [top.shape[0]])


@triton.jit
def _most(bound):
    """No score is greater whose bound is `bound` but for its lowest bits; -inf for none."""
    real = tl.maximum(bound, -3e38)
    return tl.where(real > -3e38, (real + tl.abs(real) * 2.0**-16) * LN2 + (32 * LN2 + SLACK), float("-inf"))


@triton.jit
def _hash(key, ids):
    return mix(key + (ids + 1).to(tl.uint32).to(tl.uint64) * GOLDEN)


@triton.jit
def _halves(bits):
    """The complement's, as float32."""
    high, low = (bits >> 32).to(tl.uint32), (bits & 0xFFFFFFFF).to(tl.uint32)
    return (high ^ 0xFFFFFFFF).to(tl.float32), (low ^ 0xFFFFFFFF).to(tl.float32)


@triton.jit
def _log2_high(key, ids, APPROX: tl.constexpr):
    """log2(2^32 rest), or less by a rounding."""
    high, _low = _halves(_hash(key, ids))
    return log2(tl.maximum(high, 2.0**-33), APPROX)


@triton.jit
def _noise(key, ids, APPROX: tl.constexpr):
    """Naive's, as float32: -ln(-ln(1 - rest)). Large noise is a small `rest`, which float32 holds well."""
    high, low = _halves(_hash(key, ids))
    rest = high * 2.0**-32 + (low + 0.5) * 2.0**-64
    series = rest * (1 + rest * (1 / 2 + rest * (1 / 3 + rest * (1 / 4 + rest * (1 / 5)))))
    whole = -LN2 * log2(tl.maximum(1 - rest, 2.0**-25), APPROX)
    return -LN2 * log2(tl.where(rest < 0.0625, series, whole), APPROX)


@triton.jit
def log2(x, APPROX: tl.constexpr):
    """To 2^-22 if APPROX, an instruction of NVIDIA's; tl.log2 is exact to the last bit, and twenty of them."""
    if APPROX:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def ordered(x):
    """int32 in the order of the float32 x; both zeros are one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def mass(x, best, rate):
    """exp((x - best) * rate); 0 for -inf, even where that is the best."""
    return tl.exp2((x - tl.maximum(best, -3e38)) * (rate * LOG2E))


@triton.jit
def first_best(x, ids):
    """(greatest, the smallest of its ids)"""
    best = tl.max(x)
    return best, tl.min(tl.where(x == best, ids, 0x7FFFFFFF))


@triton.jit
def limits(rules, s):
    """(temperature, top_k, top_p, min_p, whether any of the filters is on)"""
    temperature, top_k, top_p, min_p, _seed, _position = rules
    t, k = tl.load(temperature + s), tl.load(top_k + s).to(tl.int32)
    p, m = tl.load(top_p + s), tl.load(min_p + s)
    return t, k, p, m, (t > 0) & ((k > 0) | (p < 1) | (m > 0))
