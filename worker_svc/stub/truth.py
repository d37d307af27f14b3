"""The truth machine's arithmetic: each next token follows from the whole history, by a hash.

A token's KV is a word per virtual head; a rank holds a range of heads, as with real KV. The digest of a history is a
sum over heads and positions, so that it is the same whatever the TP degree, and one wrong, missing, doubled or
misplaced word in any block of any rank changes the tokens that follow. What sampling parameters do to the choice is in
`edits`.
"""

import numpy as np
import numpy.typing as npt

from albireo.arrays import BoolArray, Int32Array, Int64Array, UInt64Array, unpack_float32, unpack_int32
from albireo.logprobs import Logprobs
from albireo.v1 import plan_pb2
from worker_svc.stub.edits import bias_word, forbid_bad_words, next_allowed, penalty_word
from worker_svc.stub.hashing import GOLDEN, mix

NUM_HEADS = 8  # the largest TP degree of a stub group


def kv_words(token_ids: Int32Array, heads: range) -> UInt64Array:
    """[N] -> [N, heads]: what each token writes into its place in the cache."""
    tokens = token_ids.astype(np.uint64)[:, None] * np.uint64(NUM_HEADS)
    head_ids = np.arange(heads.start + 1, heads.stop + 1, dtype=np.uint64)
    words: UInt64Array = (tokens + head_ids) * GOLDEN
    return mix(words)


def digest(words: UInt64Array, context_lens: Int32Array) -> UInt64Array:
    """[R, positions, heads] -> [R]: these heads' part of each history's digest; parts add up over ranks."""
    positions = np.arange(words.shape[1], dtype=np.uint64)
    mixed = mix(words + (positions * GOLDEN)[None, :, None])
    mixed[positions[None, :] >= context_lens[:, None].astype(np.uint64)] = 0
    sums: UInt64Array = mixed.sum(axis=(1, 2), dtype=np.uint64)
    return sums


def choose_tokens(
    digests: UInt64Array,
    output_positions: Int64Array,
    temperatures: npt.NDArray[np.float32],
    seeds: UInt64Array,
    vocab_size: int,
) -> Int32Array:
    """[S] digests of whole histories -> [S] tokens. As in a real sampler, the seed and the output position matter where
    the temperature is not 0."""
    noise = mix(seeds + output_positions.astype(np.uint64) * GOLDEN)
    words = mix(digests ^ np.where(temperatures > 0, noise, np.uint64(0)))
    return (words % np.uint64(vocab_size)).astype(np.int32)


def token_logprobs(digests: UInt64Array, token_ids: Int32Array, num_top: Int32Array, vocab_size: int) -> Logprobs:
    """[L] digests of histories and the tokens that followed -> their log-probabilities, and so many of the likeliest.

    The likeliest token is the greedy one, then come the ids that follow it; the logarithm is a multiple of 1/256 that
    falls with the rank, exact in float32.
    """
    words = mix(digests)
    likeliest = (words % np.uint64(vocab_size)).astype(np.int64)
    offsets = (words >> np.uint64(60)).astype(np.int64)
    ranks = (token_ids - likeliest) % vocab_size + 1
    num_top = np.minimum(num_top, vocab_size)
    owners = np.repeat(np.arange(len(num_top)), num_top)
    top_ranks = np.arange(1, len(owners) + 1) - np.repeat(np.cumsum(num_top) - num_top, num_top)
    return Logprobs(
        indices=np.arange(len(token_ids), dtype=np.int32),
        logprobs=_logprob(ranks, offsets),
        ranks=ranks.astype(np.int32),
        num_top=num_top.astype(np.int32),
        top_token_ids=((likeliest[owners] + top_ranks - 1) % vocab_size).astype(np.int32),
        top_logprobs=_logprob(top_ranks, offsets[owners]),
    )


def _logprob(ranks: Int64Array, offsets: Int64Array) -> npt.NDArray[np.float32]:
    return (-(16 * ranks + offsets) / 256).astype(np.float32)


def noise_tokens(seeds: UInt64Array, output_positions: Int64Array, vocab_size: int) -> Int32Array:
    """[S] tokens that depend on seed and output position alone: cheap, and the same in every run."""
    words = (seeds * GOLDEN ^ output_positions.view(np.uint64)) * GOLDEN >> np.uint64(32)
    return (words % np.uint64(vocab_size)).astype(np.int32)


def true_tokens(
    prompt: Int32Array, sampling: plan_pb2.Sampling, stop_token_ids: frozenset[int], max_tokens: int, vocab_size: int
) -> Int32Array:
    """The output of one sequence by the definition alone: the oracle of every test on the stub.

    Ends like a sequence: after ``max_tokens``, or with the first of ``stop_token_ids`` past ``min_tokens``.
    """
    part = digest(kv_words(prompt, range(NUM_HEADS))[None], np.array([len(prompt)], dtype=np.int32))
    output: Int32Array = np.zeros(0, dtype=np.int32)
    for position in range(max_tokens):
        token = choose_tokens(
            part ^ np.uint64(_parameter_word(sampling, prompt, output)),
            np.array([position]),
            np.array([sampling.temperature], dtype=np.float32),
            np.array([sampling.seed], dtype=np.uint64),
            vocab_size,
        )
        token[0] = next_allowed(int(token[0]), _allowed(sampling, output, vocab_size))
        output = np.append(output, token)
        if int(token[0]) in stop_token_ids and position >= sampling.min_tokens:
            break
        words = kv_words(token, range(NUM_HEADS)) + np.array([len(prompt) + position], dtype=np.uint64) * GOLDEN
        part = part + mix(words).sum(dtype=np.uint64)
    return output


def _parameter_word(sampling: plan_pb2.Sampling, prompt: Int32Array, output: Int32Array) -> int:
    repetition, presence, frequency = (
        sampling.repetition_penalty or 1.0,
        sampling.presence_penalty,
        sampling.frequency_penalty,
    )
    ids, biases = unpack_int32(sampling.bias_token_ids), unpack_float32(sampling.biases)
    never = [word for word in map(unpack_int32, sampling.bad_words) if len(word) == 1]
    if len(output) < sampling.min_tokens:
        never.append(unpack_int32(sampling.suppressed_token_ids))
    counts = ~np.isin(ids, np.concatenate(never) if never else [])  # a bias of what is never sampled does nothing
    return bias_word(ids[counts], biases[counts]) ^ penalty_word(repetition, presence, frequency, prompt, output)


def _allowed(sampling: plan_pb2.Sampling, output: Int32Array, vocab_size: int) -> BoolArray:
    """[vocab_size], whether a token may follow ``output``."""
    may_be: BoolArray = np.full(vocab_size, not (sampling.allowed_token_ids or sampling.allowed_mask))
    may_be[unpack_int32(sampling.allowed_token_ids)] = True
    if sampling.allowed_mask:
        mask = np.frombuffer(sampling.allowed_mask, dtype=np.uint8)
        may_be = np.unpackbits(mask, count=vocab_size, bitorder="little").view(np.bool_)
    if len(output) < sampling.min_tokens:
        may_be[unpack_int32(sampling.suppressed_token_ids)] = False
    forbid_bad_words(may_be, [unpack_int32(word) for word in sampling.bad_words], output)
    return may_be


def true_logprobs(prompt: Int32Array, output: Int32Array, num_logprobs: int, vocab_size: int) -> Logprobs:
    """Of all tokens of a sequence's output, by the definition alone; no sampling parameter matters."""
    history = np.concatenate((prompt, output))
    lens = np.arange(len(prompt), len(history), dtype=np.int32)
    words = np.repeat(kv_words(history, range(NUM_HEADS))[None], len(lens), axis=0)
    num_top = np.full(len(lens), num_logprobs, dtype=np.int32)
    return token_logprobs(digest(words, lens), output, num_top, vocab_size)
