# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,no-any-return,misc,untyped-decorator"
# ruff: noqa: PLR0124 - kernels find NaN by comparison
"""What the kernels share: sort keys, noise, probability masses, and the search for a cut.

A *key* is a token's place in the total order (value descending, id ascending) as an int64, greatest first: the value's
bits as an ordered int32, above 2^22 - 1 - id. Keys of a row are distinct. -0 equals 0; NaN is -inf. A *cut* is a key:
the tokens whose keys reach it survive.

Loops are written with while: the interpreter of Triton 3.6 on numpy 2.4 and later has no range over tensors.
"""

import triton
import triton.language as tl

# No fused multiply-add: the oracle rounds each operation by itself, and so the interpreter and every GPU agree.
LAUNCH = {"enable_fp_fusion": False}

MAX_VOCAB_SIZE = 1 << 22
NO_ID = 2**31 - 1
"""The id in the record of a shard without values: it loses every tie."""

ID_BITS: tl.constexpr = tl.constexpr(22)
MAX_ID: tl.constexpr = tl.constexpr((1 << 22) - 1)
SENTINEL_ID: tl.constexpr = tl.constexpr(NO_ID)
# One key below all keys: it stands for no token, and as a cut it lets everything pass.
MIN_KEY: tl.constexpr = tl.constexpr(-(1 << 63))
MIN_TEMPERATURE: tl.constexpr = tl.constexpr(1e-5)
# Masses are in units of 2^-44: a sum over 2^18 tokens, each of mass 1, stays below 2^63.
MASS_BITS: tl.constexpr = tl.constexpr(44)


@triton.jit
def load_ids(start, width, first_id, TILE: tl.constexpr):
    """Columns [TILE], which of them exist, and their global ids."""
    columns = start + tl.arange(0, TILE)
    return columns, columns < width, first_id + columns


@triton.jit
def is_greedy(temperature, top_k):
    return (temperature < MIN_TEMPERATURE) | (top_k == 1)


@triton.jit
def scale(logits, temperature, top_k):
    """logits / temperature, correctly rounded; of greedy rows the logits; NaN becomes -inf."""
    scaled = tl.div_rn(logits, tl.where(is_greedy(temperature, top_k), 1.0, temperature) + tl.zeros_like(logits))
    return tl.where(scaled != scaled, float("-inf"), scaled)


@triton.jit
def ordered_bits(values):
    """int32 that are ordered as the float32 are; NaN as -inf, -0 as 0. The smallest int32 stays free."""
    values = tl.where(values != values, float("-inf"), tl.where(values == 0.0, 0.0, values))
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def make_keys(values, ids):
    return (ordered_bits(values).to(tl.int64) << 32) | (ids ^ MAX_ID).to(tl.int64)


@triton.jit
def key_values(keys):
    """The float32 values of keys."""
    bits = (keys >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_ids(keys):
    return (keys & MAX_ID).to(tl.int32) ^ MAX_ID


@triton.jit
def min_p_cut(largest, log_min_p):
    """The first key of a value of at least largest + log(min_p), that sum rounded to float32; log(0): no cut."""
    bound = (largest.to(tl.float64) + log_min_p).to(tl.float32)
    return tl.where(log_min_p == float("-inf"), MIN_KEY, ordered_bits(bound).to(tl.int64) << 32)


@triton.jit
def log(x):
    """Natural logarithm of normal positive float32, to about an ulp (Cephes' logf; Moshier 1989)."""
    bits = x.to(tl.int32, bitcast=True)
    # The mantissa in [sqrt(1/2), sqrt(2)), so that no digits cancel where x is near 1.
    shifted = bits - 0x3F3504F3
    exponent = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    z = f * f
    y = f * 7.0376836292e-2 - 1.1514610310e-1
    y = y * f + 1.1676998740e-1
    y = y * f - 1.2420140846e-1
    y = y * f + 1.4249322787e-1
    y = y * f - 1.6668057665e-1
    y = y * f + 2.0000714765e-1
    y = y * f - 2.4999993993e-1
    y = y * f + 3.3333331174e-1
    y = y * f * z - exponent * 2.12194440e-4 - z * 0.5
    return f + y + exponent * 0.693359375


@triton.jit
def fmix32(h):
    """Murmur3's finaliser, of uint32."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def gumbel_noise(ids, k0, k1):
    """Standard Gumbel noise of token ids: the oracle's hash bit for bit, its logarithms to an ulp or two.

    Args:
        ids: int32.
        k0, k1: the row's key, int32 with the bits of uint32.
    """
    h = fmix32((ids.to(tl.uint32, bitcast=True) * 0x9E3779B9) ^ k0.to(tl.uint32, bitcast=True))
    h = fmix32(h + k1.to(tl.uint32, bitcast=True))
    v = tl.minimum((h.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1 - 5.960464477539063e-08)
    # -log1p(-v): what rounding 1 - v lost is added; where it lost anything v < 1/2, and 1 + v does for 1 / (1 - v).
    u = 1.0 - v
    lost = (1.0 - u) - v
    return -log(-(log(u) + lost * (1.0 + v)))


@triton.jit
def masses(values, largest):
    """exp(values - largest) as int64 in units of 2^-44, rounded down; to about 1e-7 of each (Cephes' expf).

    Args:
        values: float32, at most ``largest``, which has mass 1 even where it is infinite.
    """
    # 2^-46 and less is nothing; the bound keeps infinities and the integers below in range.
    d = tl.maximum(tl.where(values == largest, 0.0, values - largest), -60.0)
    n = tl.floor(d * 1.44269504088896341 + 0.5)
    r = d - n * 0.693359375 + n * 2.12194440e-4
    y = r * 1.9875691500e-4 + 1.3981999507e-3
    y = y * r + 8.3334519073e-3
    y = y * r + 4.1665795894e-2
    y = y * r + 1.6666665459e-1
    y = y * r + 5.0000001201e-1
    y = y * r * r + r + 1.0
    # y in [0.7, 1.42) has 24 bits: as an integer it is exact, and 2^n shifts it.
    units = (y * 1073741824.0).to(tl.int64) << (MASS_BITS - 30)
    return units >> tl.minimum(-n, 63.0).to(tl.int64)


@triton.jit
def mass_target(total, top_p):
    """The mass that a nucleus reaches: the least integer of at least top_p * total, and at least 1."""
    return tl.maximum(tl.ceil(total.to(tl.float64) * top_p).to(tl.int64), 1)


@triton.jit
def find_cut(keys, weights, target):
    """The greatest key at which weights, summed in the keys' order, reach a target: bit by bit, in registers.

    Args:
        keys: [N] int64; MIN_KEY must have weight 0.
        weights: [N] int64, not negative.
        target: int64, positive.
    Returns:
        A cut that leaves the shortest prefix which reaches ``target``; MIN_KEY where all together do not.
    """
    cut = tl.full((), MIN_KEY, tl.int64)
    reached = tl.sum(weights, 0)
    bit = 63
    # Often the sum meets the target before the last bit is known; a cut between keys is as good as the key itself.
    while (bit >= 0) & (reached > target):
        trial = cut ^ (tl.full((), 1, tl.int64) << bit)
        total = tl.sum(tl.where(keys >= trial, weights, 0), 0)
        cut = tl.where(total >= target, trial, cut)
        reached = tl.where(total >= target, total, reached)
        # Between value and id there are no bits.
        bit = tl.where(bit == 32, ID_BITS - 1, bit - 1)
    return cut


@triton.jit
def first_best(scores, ids):
    """(score, id) of the greatest score, the lower id among equals; NO_ID where all are -inf."""
    score = tl.max(scores, 0)
    return score, tl.min(tl.where((scores == score) & (scores != float("-inf")), ids, SENTINEL_ID), 0)
