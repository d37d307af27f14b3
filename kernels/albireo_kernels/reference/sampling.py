"""What sampling means, one row at a time: what is done to logits, which tokens survive, and the noise that picks one.

Parameters apply in one order: logit bias, allowed ids, bad words; repetition, presence and frequency penalty;
temperature; min-p, top-k, top-p, each among the survivors of the one before. Logprobs are those of the model: of the
logits before all that.

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

Everything is ordered one way: by value descending, then by id ascending. A NaN is no value: it comes last, it never
survives beside others, and a row without values draws token 0.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Of one row.

    Attributes:
        temperature: 0 means greedy, as top_k = 1 does.
        top_k: 0 means all.
        top_p: 1 means all.
        min_p: 0 means all.
        biases: by token id; -inf: never.
        allowed: the ids that may be sampled; None: all.
        bad_words: token ids that never follow each other in the output.
        prompt, output: the sequence's tokens so far.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    biases: Mapping[int, float] = field(default_factory=dict)
    allowed: Collection[int] | None = None
    bad_words: Sequence[Sequence[int]] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()


def edit(logits: Tensor, params: Params) -> Tensor:
    """Logits that temperature and filters then work on.

    A repetition penalty r makes a logit x of a token in prompt or output x / r where it is positive, else x * r (Keskar
    et al. 2019); frequency and presence penalties subtract, of tokens in the output, the penalty times their number
    there, then the penalty (OpenAI's definition). All in float32, each operation rounded by itself.

    Args:
        logits: [vocab_size] float32.
    Returns:
        [vocab_size] float32, others than the given ones.
    """
    edited = logits.clone()
    for token, bias in params.biases.items():
        edited[token] += bias
    if params.allowed is not None:
        forbidden = torch.ones(len(logits), dtype=torch.bool)
        forbidden[list(params.allowed)] = False
        edited[forbidden] = -torch.inf
    for *before, last in params.bad_words:
        if not before or list(params.output[-len(before) :]) == before:
            edited[last] = -torch.inf
    output = torch.bincount(torch.tensor(params.output, dtype=torch.int64), minlength=len(logits))
    seen = output > 0
    seen[list(params.prompt)] = True
    repetition = torch.tensor(params.repetition_penalty, dtype=torch.float32)
    penalised = torch.where(edited > 0, edited / repetition, edited * repetition)
    edited = torch.where(seen, penalised, edited)
    edited -= torch.tensor(params.frequency_penalty, dtype=torch.float32) * output
    edited -= torch.tensor(params.presence_penalty, dtype=torch.float32) * (output > 0)
    return edited


def survivors(scaled: Tensor, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
    """Which tokens min-p, then top-k, then top-p leave.

    Min-p keeps tokens whose probability is at least ``min_p`` times the largest: values from largest + log(min_p) on,
    that sum rounded to float32. Of those, top-k keeps the first ``top_k``, exactly. Of those, top-p keeps the shortest
    prefix in order whose share of their mass reaches ``top_p``, and at least one.

    Args:
        scaled: [vocab_size] float32, logits / temperature.
        top_k: 0 means all.
        top_p: 1 means all.
        min_p: 0 means all.
    Returns:
        ids of the survivors, in order.
    """
    values, ids = torch.where(scaled.isnan(), -torch.inf, scaled).sort(descending=True, stable=True)
    if min_p > 0:
        bound = torch.tensor(float(values[0]) + math.log(min_p), dtype=torch.float32)
        values, ids = values[values >= bound], ids[values >= bound]
    if top_k:
        values, ids = values[:top_k], ids[:top_k]
    if top_p >= 1:
        return ids
    weights = (values.double() - values[0].double()).exp()
    before = weights.cumsum(0) - weights
    return ids[: max(1, int((before < top_p * weights.sum()).sum()))]


def sample_row(logits: Tensor, params: Params, position: int) -> int:
    """Samples one token.

    Args:
        logits: [vocab_size] float32, of the model.
        position: index of the sampled token in its sequence's output.
    """
    edited = edit(logits, params)
    if params.temperature < MIN_TEMPERATURE or params.top_k == 1:
        return int(torch.where(edited.isnan(), -torch.inf, edited).argmax())
    scaled = edited / params.temperature
    ids = survivors(scaled, params.top_k, params.top_p, params.min_p).sort().values
    k0, k1 = noise_keys(np.array([params.seed], dtype=np.uint64), np.array([position]))
    noise = gumbel_noise(ids, torch.from_numpy(k0), torch.from_numpy(k1))[0]
    return int(ids[torch.where(scaled[ids].isnan(), -torch.inf, scaled[ids] + noise).argmax()])


class TokenLogprobs(NamedTuple):
    """Of one sampled token.

    Attributes:
        logprob: natural, float64.
        rank: its place in the order of all tokens, from 1.
        top_ids, top_logprobs: the first tokens in that order.
    """

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


def token_logprobs(logits: Tensor, token: int, num_top: int) -> TokenLogprobs:
    """What the model makes of a token.

    Args:
        logits: [vocab_size] float32, of the model.
        num_top: how many of the likeliest tokens to name.
    """
    logprobs = torch.where(logits.isnan(), -torch.inf, logits).double().log_softmax(0)
    order = logprobs.sort(descending=True, stable=True).indices
    rank = int((order == token).nonzero()) + 1
    top = order[:num_top]
    return TokenLogprobs(float(logprobs[token]), rank, top.tolist(), logprobs[top].tolist())
