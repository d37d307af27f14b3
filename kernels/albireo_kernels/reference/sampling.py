"""What sampling means, one row at a time: which tokens survive top-k and top-p, and the keyed noise that picks one.

The noise has no state. It is a function of the request's seed, the output position and the global token id, so a draw
depends neither on the batch, nor on the slot, nor on how the vocabulary is sharded. All of it up to the 32-bit hash is
integer arithmetic, which versions in other languages must reproduce bit for bit:

    splitmix64(x):  x += 0x9E3779B97F4A7C15                          mod 2^64
                    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9           mod 2^64
                    x = (x ^ x >> 27) * 0x94D049BB133111EB           mod 2^64
                    return x ^ x >> 31
    fmix32(h):      h = (h ^ h >> 16) * 0x85EBCA6B                   mod 2^32
                    h = (h ^ h >> 13) * 0xC2B2AE35                   mod 2^32
                    return h ^ h >> 16

    per row:        key = splitmix64(splitmix64(seed) + position)    mod 2^64
                    k0, k1 = low and high 32 bits of key
    per token id:   h = fmix32(id * 0x9E3779B9 mod 2^32 ^ k0)
                    h = fmix32(h + k1 mod 2^32)
    in float32:     v = min((float(h) + 0.5) * 2^-32, 1 - 2^-24)     float() rounds to nearest even
                    E = -log1p(-v)                                   exponential; small ones keep full precision
                    gumbel = -log(E)

The token is argmax(logits / temperature + gumbel) over the survivors: an exact draw from their softmax (Gumbel 1954).
Large noise is what decides, and comes from small v, hence the form with log1p.

Everything is ordered one way: by value descending, then by id ascending.
"""

import numpy as np
import torch
from torch import Tensor

from albireo.arrays import Int64Array, UInt64Array
from albireo_kernels.noise import row_keys

# Below this temperature a row is greedy: logits / temperature would leave float32's range, and noise decides nothing.
MIN_TEMPERATURE = 1e-5

_MASK32 = 0xFFFFFFFF


def noise_keys(seeds: UInt64Array, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
    """The two 32-bit keys of each row's noise.

    Args:
        seeds: [num_rows], of the requests.
        positions: [num_rows], index of the sampled token in its sequence's output.
    Returns:
        k0, k1: [num_rows] int64, in 0 .. 2^32 - 1.
    """
    keys = row_keys(seeds, positions)
    return (keys & np.uint64(_MASK32)).astype(np.int64), (keys >> np.uint64(32)).astype(np.int64)


def fmix32(h: Tensor) -> Tensor:
    """Murmur3's 32-bit finaliser, a bijection.

    Args:
        h: int64, in 0 .. 2^32 - 1; overwritten.
    """
    # Products wrap at 64 bits, which leaves their low 32 right.
    h = h.bitwise_xor_(h >> 16).mul_(0x85EBCA6B).bitwise_and_(_MASK32)
    h = h.bitwise_xor_(h >> 13).mul_(0xC2B2AE35).bitwise_and_(_MASK32)
    return h.bitwise_xor_(h >> 16)


def gumbel_noise(ids: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
    """Standard Gumbel noise of token ids under their rows' keys.

    Args:
        ids: [num_ids] or [num_rows, num_ids] int64, global token ids.
        k0, k1: [num_rows] int64, from `noise_keys`.
    Returns:
        [num_rows, num_ids] float32, finite.
    """
    h = fmix32((ids * 0x9E3779B9 & _MASK32) ^ k0[:, None])
    h = fmix32(h.add_(k1[:, None]).bitwise_and_(_MASK32))
    v = h.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return v.neg_().log1p_().neg_().log_().neg_()


def survivors(scaled: Tensor, top_k: int, top_p: float) -> Tensor:
    """Which tokens top-k, then top-p leave.

    Exactly ``top_k`` tokens survive top-k. Of those, top-p keeps the shortest prefix in order whose share of their mass
    reaches ``top_p``, and at least one.

    Args:
        scaled: [vocab_size] float32, logits / temperature.
        top_k: 0 means all.
        top_p: 1 means all.
    Returns:
        ids of the survivors, in order.
    """
    values, ids = scaled.sort(descending=True, stable=True)
    if top_k:
        values, ids = values[:top_k], ids[:top_k]
    if top_p >= 1:
        return ids
    weights = (values.double() - values[0].double()).exp()
    before = weights.cumsum(0) - weights
    return ids[: max(1, int((before < top_p * weights.sum()).sum()))]


def sample_row(logits: Tensor, temperature: float, top_k: int, top_p: float, seed: int, position: int) -> int:
    """Samples one token.

    Args:
        logits: [vocab_size] float32.
        temperature: 0 means greedy, as top_k = 1 does.
    """
    if temperature < MIN_TEMPERATURE or top_k == 1:
        return int(logits.argmax())
    scaled = logits / temperature
    ids = survivors(scaled, top_k, top_p).sort().values
    k0, k1 = noise_keys(np.array([seed], dtype=np.uint64), np.array([position]))
    noise = gumbel_noise(ids, torch.from_numpy(k0), torch.from_numpy(k1))[0]
    return int(ids[(scaled[ids] + noise).argmax()])
