"""The truth machine's arithmetic: each next token follows from the whole history, by a hash.

A token's KV is a word per virtual head; a rank holds a range of heads, as with real KV. The digest of a history is a
sum over heads and positions, so that it is the same whatever the TP degree, and one wrong, missing, doubled or
misplaced word in any block of any rank changes the tokens that follow.
"""

import numpy as np
import numpy.typing as npt

from albireo.arrays import Int32Array, Int64Array, UInt64Array
from albireo.v1 import plan_pb2

NUM_HEADS = 8  # the largest TP degree of a stub group

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea, Flood 2014), element by element."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def kv_words(token_ids: Int32Array, heads: range) -> UInt64Array:
    """[N] -> [N, heads]: what each token writes into its place in the cache."""
    tokens = token_ids.astype(np.uint64)[:, None] * np.uint64(NUM_HEADS)
    head_ids = np.arange(heads.start + 1, heads.stop + 1, dtype=np.uint64)
    words: UInt64Array = (tokens + head_ids) * _GOLDEN
    return mix(words)


def digest(words: UInt64Array, context_lens: Int32Array) -> UInt64Array:
    """[R, positions, heads] -> [R]: these heads' part of each history's digest; parts add up over ranks."""
    positions = np.arange(words.shape[1], dtype=np.uint64)
    mixed = mix(words + (positions * _GOLDEN)[None, :, None])
    mixed[positions[None, :] >= context_lens[:, None].astype(np.uint64)] = 0
    sums: UInt64Array = mixed.sum(axis=(1, 2), dtype=np.uint64)
    return sums


def choose_tokens(
    digests: UInt64Array,
    output_positions: Int64Array,
    temperatures: npt.NDArray[np.float32],
    seeds: UInt64Array,
    suppressed: list[Int32Array],
    vocab_size: int,
) -> Int32Array:
    """[S] digests of whole histories -> [S] tokens. As in a real sampler, the seed and the output position matter where
    the temperature is not 0, and a suppressed id is never chosen (the next one is)."""
    noise = mix(seeds + output_positions.astype(np.uint64) * _GOLDEN)
    words = mix(digests ^ np.where(temperatures > 0, noise, np.uint64(0)))
    tokens = (words % np.uint64(vocab_size)).astype(np.int32)
    for row, ids in enumerate(suppressed):
        while tokens[row] in ids:
            tokens[row] = (tokens[row] + 1) % vocab_size
    return tokens


def noise_tokens(seeds: UInt64Array, output_positions: Int64Array, vocab_size: int) -> Int32Array:
    """[S] tokens that depend on seed and output position alone: cheap, and the same in every run."""
    words = (seeds * _GOLDEN ^ output_positions.view(np.uint64)) * _GOLDEN >> np.uint64(32)
    return (words % np.uint64(vocab_size)).astype(np.int32)


def true_tokens(
    prompt: Int32Array, sampling: plan_pb2.Sampling, stop_token_ids: frozenset[int], max_tokens: int, vocab_size: int
) -> Int32Array:
    """The output of one sequence by the definition alone: the oracle of every test on the stub.

    Ends like a sequence: after ``max_tokens``, or with the first of ``stop_token_ids`` past ``min_tokens``.
    """
    history = list(prompt)
    part = digest(kv_words(np.array(history, dtype=np.int32), range(NUM_HEADS))[None], np.array([len(history)]))
    suppressed = np.frombuffer(sampling.suppressed_token_ids, dtype="<i4")
    none = np.zeros(0, dtype=np.int32)
    for position in range(max_tokens):
        token = choose_tokens(
            part,
            np.array([position]),
            np.array([sampling.temperature], dtype=np.float32),
            np.array([sampling.seed], dtype=np.uint64),
            [suppressed if position < sampling.min_tokens else none],
            vocab_size,
        )
        history.append(int(token[0]))
        if history[-1] in stop_token_ids and position >= sampling.min_tokens:
            break
        words = kv_words(token, range(NUM_HEADS)) + np.array([len(history) - 1], dtype=np.uint64) * _GOLDEN
        part = part + mix(words).sum(dtype=np.uint64)
    return np.array(history[len(prompt) :], dtype=np.int32)
